#include "embedding/op.h"

#include <vector>

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

int64_t element(const Tensor& t, int64_t i) {
  int64_t offset = 0;
  for (int d = t.ndim - 1; d >= 0; --d) {
    offset += i % t.shape[d] * t.stride[d];
    i /= t.shape[d];
  }
  return t.dtype == DType::i64 ? t.ptr<int64_t>()[offset] : t.ptr<int32_t>()[offset];
}

}  // namespace

void embedding_sum(const std::vector<Tensor>& indices, const std::vector<Tensor>& tables,
                   const Tensor& out, int64_t executor) {
  const auto count = static_cast<int64_t>(tables.size());
  CHECK(count >= 1 && count <= kMaxTables && indices.size() == tables.size(), count);
  for (int i = 0; i < count; ++i) {
    const Tensor &index = indices[i], &table = tables[i];
    CHECK_TENSORS(index, table, out);
    CHECK(index.dtype == DType::i64 || index.dtype == DType::i32, index);
    CHECK(index.same_shape(indices[0]), index, indices[0]);
    CHECK(table.floating() && table.ndim == 2, table);
    CHECK(out.floating() && out.ndim == index.ndim + 1 && out.dim(-1) == table.dim(1), out, index,
          table);
    for (int d = 0; d < index.ndim; ++d) CHECK(out.dim(d) == index.dim(d), out, index);
  }
  if (out.numel() == 0) return;

  EmbeddingSumParams p{static_cast<int>(count)};
  p.out = rows(out);
  const int64_t n = indices[0].numel();
  std::vector<int64_t> checked(runs_on_cpu(out) ? count * n : 0);
  for (int i = 0; i < count; ++i) {
    p.table[i] = rows(tables[i]);
    p.index[i] = elements(indices[i]);
    if (!runs_on_cpu(out)) continue;
    p.index[i].data = checked.data() + i * n;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = checked[i * n + j] = element(indices[i], j);
      const Tensor& table = tables[i];
      CHECK(row >= 0 && row < table.dim(0), row, table);
    }
  }
  RUN_KERNEL(embedding_sum, p, out, executor);
}

void embedding_sum_backward(const Tensor& grad, const Tensor& index, const Tensor& order,
                            const Tensor& dtable, const Tensor& work, int64_t padding,
                            int64_t executor) {
  CHECK_TENSORS(grad, index, order, dtable, work);
  CHECK(grad.floating() && grad.ndim == 2, grad);
  CHECK(dtable.floating() && dtable.ndim == 2 && dtable.dim(1) == grad.dim(1), dtable, grad);
  CHECK(index.dtype == DType::i64 && index.ndim == 1 && index.dim(0) == grad.dim(0), index, grad);
  CHECK(order.dtype == DType::i64 && order.same_shape(index), order, index);
  CHECK(index.contiguous() && order.contiguous(), index, order);
  CHECK(work.dtype == DType::f32 && work.ndim == 2 && work.contiguous(), work);
  CHECK(work.dim(0) == 2 * ((grad.dim(0) + kSegment - 1) / kSegment), work, grad);
  CHECK(work.dim(1) == grad.dim(1), work, grad);
  if (grad.numel() == 0) return;
  if (runs_on_cpu(grad)) {
    for (int64_t i = 0; i < index.dim(0); ++i) {
      const int64_t row = index.ptr<int64_t>()[i], from = order.ptr<int64_t>()[i];
      CHECK(row >= 0 && row < dtable.dim(0), row, dtable);
      CHECK(from >= 0 && from < grad.dim(0), from, grad);
    }
  }

  EmbeddingSumBackwardParams p{rows(grad),           rows(dtable), index.ptr<int64_t>(),
                               order.ptr<int64_t>(), padding,      rows(work)};
  RUN_KERNEL(embedding_sum_backward, p, grad, executor);
}

void bind_embedding(py::module_& m) {
  m.def("embedding_sum", op(&embedding_sum), py::arg("indices"), py::arg("tables"), py::arg("out"),
        py::arg("executor"), nogil());
  m.def("embedding_sum_backward", op(&embedding_sum_backward), py::arg("grad"), py::arg("index"),
        py::arg("order"), py::arg("dtable"), py::arg("work"), py::arg("padding"),
        py::arg("executor"), nogil());
}

}  // namespace warpformer
