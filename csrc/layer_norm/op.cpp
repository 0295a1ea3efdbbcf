#include "layer_norm/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {

void layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const Tensor& out, double eps, int64_t executor) {
  CHECK_TENSORS(x, residual, weight, bias, out);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(out.floating() && out.same_shape(x), out, x);
  if (residual) CHECK(residual->floating() && residual->same_shape(x), residual, x);
  for (const auto& scale : {weight, bias})
    if (scale)
      CHECK(scale->floating() && scale->ndim == 1 && scale->dim(0) == x.dim(-1), weight, bias, x);
  if (x.numel() == 0) return;

  LayerNormParams p{rows(x)};
  if (residual) p.residual = rows(*residual);
  if (weight) p.weight = rows(*weight);
  if (bias) p.bias = rows(*bias);
  p.out = rows(out);
  p.eps = static_cast<float>(eps);
  RUN_KERNEL(layer_norm, p, x, executor);
}

void bind_layer_norm(py::module_& m) {
  m.def("layer_norm", &layer_norm, py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("out"), py::arg("eps"), py::arg("executor"), nogil());
}

}  // namespace warpformer
