#include "moe/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

bool is_list(const Tensor& t, DType dtype, int64_t size) {
  return t.dtype == dtype && t.ndim == 1 && t.dim(0) == size && t.contiguous();
}
bool is_places(const Tensor& t) { return t.dtype == DType::i64 && t.ndim == 2 && t.contiguous(); }
bool is_rows(const Tensor& t, int64_t count) {
  return t.floating() && t.ndim == 2 && t.dim(0) == count;
}

int64_t integer(const Tensor& t, int64_t n, int64_t j) {
  const int64_t at = n * t.stride[0] + j * t.stride[1];
  return t.dtype == DType::i64 ? t.ptr<int64_t>()[at] : t.ptr<int32_t>()[at];
}

}  // namespace

void sort_by_expert(const Tensor& expert_ids, const Tensor& order, const Tensor& places,
                    const Tensor& offsets, int64_t executor) {
  CHECK_TENSORS(expert_ids, order, places, offsets);
  CHECK(expert_ids.dtype == DType::i64 || expert_ids.dtype == DType::i32, expert_ids);
  CHECK(expert_ids.ndim == 2 && expert_ids.numel() <= INT32_MAX, expert_ids);
  CHECK(is_places(places) && places.same_shape(expert_ids), places, expert_ids);
  CHECK(is_list(order, DType::i64, expert_ids.numel()), order, expert_ids);
  CHECK(is_list(offsets, DType::i32, offsets.dim(0)) && offsets.dim(0) <= kMaxExperts, offsets);
  const int64_t experts = offsets.dim(0);
  if (runs_on_cpu(expert_ids)) {
    for (int64_t n = 0; n < expert_ids.dim(0); ++n)
      for (int64_t j = 0; j < expert_ids.dim(1); ++j) {
        const int64_t expert = integer(expert_ids, n, j);
        CHECK(expert >= 0 && expert < experts, expert, experts, expert_ids);
      }
  }

  SortByExpertParams p{elements(expert_ids), static_cast<int>(experts)};
  p.order = order.ptr<int64_t>();
  p.places = places.ptr<int64_t>();
  p.offsets = offsets.ptr<int32_t>();
  RUN_KERNEL(sort_by_expert, p, expert_ids, executor);
}

void spread_rows(const Tensor& input, const Tensor& order, int64_t k, const Tensor& out,
                 int64_t executor) {
  CHECK_TENSORS(input, order, out);
  CHECK(is_rows(input, input.dim(0)), input);
  CHECK(k >= 0 && k <= INT32_MAX, k);
  CHECK(order.ndim == 1 && order.dim(0) == input.dim(0) * k, order, input, k);
  CHECK(is_list(order, DType::i64, order.dim(0)), order);
  CHECK(is_rows(out, order.dim(0)) && out.dtype == input.dtype, out, input, order);
  CHECK(out.dim(1) == input.dim(1), out, input);
  if (out.numel() == 0) return;
  const int64_t count = order.dim(0);
  if (runs_on_cpu(input)) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = order.ptr<int64_t>()[i];
      CHECK(place >= 0 && place < count, place, order);
    }
  }

  const SpreadRowsParams p{rows(input), rows(out), order.ptr<int64_t>(), k};
  RUN_KERNEL(spread_rows, p, input, executor);
}

void sum_rows(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& places,
              const Tensor& out, int64_t executor) {
  CHECK_TENSORS(rows, weights, places, out);
  CHECK(is_places(places), places);
  CHECK(is_rows(rows, places.numel()), rows, places);
  CHECK(!weights || (weights->floating() && weights->same_shape(places)), weights, places);
  CHECK(is_rows(out, places.dim(0)) && out.dtype == rows.dtype, out, rows, places);
  CHECK(out.dim(1) == rows.dim(1), out, rows);
  if (out.numel() == 0) return;
  const int64_t count = rows.dim(0);
  if (runs_on_cpu(rows)) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = places.ptr<int64_t>()[i];
      CHECK(row >= 0 && row < count, row, places);
    }
  }

  SumRowsParams p{warpformer::rows(rows), warpformer::rows(out)};
  if (weights) {
    p.weights = weights->data;
    p.dtype = weights->dtype;
    p.weight_stride[0] = weights->stride[0];
    p.weight_stride[1] = weights->stride[1];
  }
  p.places = places.ptr<int64_t>();
  p.k = places.dim(1);
  RUN_KERNEL(sum_rows, p, rows, executor);
}

void bind_moe(py::module_& m) {
  m.def("sort_by_expert", op(&sort_by_expert), py::arg("expert_ids"), py::arg("order"),
        py::arg("places"), py::arg("offsets"), py::arg("executor"), nogil());
  m.def("spread_rows", op(&spread_rows), py::arg("input"), py::arg("order"), py::arg("k"),
        py::arg("out"), py::arg("executor"), nogil());
  m.def("sum_rows", op(&sum_rows), py::arg("rows"), py::arg("weights"), py::arg("places"),
        py::arg("out"), py::arg("executor"), nogil());
}

}  // namespace warpformer
