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
  CHECK_CPU(out);
  if (out.numel() == 0) return;

  EmbeddingSumParams p{static_cast<int>(count)};
  p.out = rows(out);
  const int64_t n = indices[0].numel();
  std::vector<int64_t> checked(count * n);
  for (int i = 0; i < count; ++i) {
    p.table[i] = rows(tables[i]);
    p.index[i] = checked.data() + i * n;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = checked[i * n + j] = element(indices[i], j);
      const Tensor& table = tables[i];
      CHECK(row >= 0 && row < table.dim(0), row, table);
    }
  }
  RUN_CPU_KERNEL(embedding_sum, p, out, executor);
}

void bind_embedding(py::module_& m) {
  m.def("embedding_sum", &embedding_sum, py::arg("indices"), py::arg("tables"), py::arg("out"),
        py::arg("executor"), nogil());
}

}  // namespace warpformer
