#include "dropout/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {

void dropout(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p,
             const Tensor& out, int64_t executor) {
  CHECK_TENSORS(x, residual, seed, out);
  CHECK(x.floating() && x.ndim > 0, x);
  if (residual) CHECK(residual->floating() && residual->same_shape(x), residual, x);
  CHECK(seed.dtype == DType::i64 && seed.numel() == 1, seed);
  CHECK(p >= 0 && p <= 1, p);
  CHECK(out.floating() && out.same_shape(x), out, x);
  if (x.numel() == 0) return;

  const bool one = x.contiguous() && out.contiguous() && (!residual || residual->contiguous());
  DropoutParams params{one ? flat(x) : rows(x)};
  if (residual) params.residual = one ? flat(*residual) : rows(*residual);
  params.out = one ? flat(out) : rows(out);
  params.seed = seed.ptr<int64_t>();
  params.threshold = static_cast<uint64_t>(p * 0x1p32);
  params.scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f;
  RUN_KERNEL(dropout, params, x, executor);
}

void bind_dropout(py::module_& m) {
  m.def("dropout", op(&dropout), py::arg("x"), py::arg("residual"), py::arg("seed"), py::arg("p"),
        py::arg("out"), py::arg("executor"), nogil());
}

}  // namespace warpformer
