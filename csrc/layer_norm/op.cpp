#include "layer_norm/op.h"

#include "core/check.h"
#include "core/isa.h"
#include "core/module.h"
#include "core/scratch.h"

namespace warpformer {

void layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const Tensor& out, double eps, int threads) {
  CHECK_TENSORS(x, residual, weight, bias, out);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(out.floating() && out.same_shape(x), out, x);
  if (residual) CHECK(residual->floating() && residual->same_shape(x), residual, x);
  for (const auto& scale : {weight, bias})
    if (scale)
      CHECK(scale->floating() && scale->ndim == 1 && scale->dim(0) == x.dim(-1), weight, bias, x);
  CHECK(threads > 0, threads);
  CHECK_CPU(x);
  if (x.numel() == 0) return;

  LayerNormParams p{rows(x)};
  if (residual) p.residual = rows(*residual);
  if (weight) p.weight = rows(*weight);
  if (bias) p.bias = rows(*bias);
  p.out = rows(out);
  p.eps = static_cast<float>(eps);
  p.threads = threads;
  p.scratch = scratch_floats((2 + 2 * threads) * p.x.n);
  CPU_KERNEL(layer_norm)(p);
}

void bind_layer_norm(py::module_& m) {
  m.def("layer_norm", &layer_norm, py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("out"), py::arg("eps"), py::arg("threads"), nogil());
}

}  // namespace warpformer
