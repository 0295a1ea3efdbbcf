#include "activation/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {

void gelu(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& out,
          const std::string& approximate, int64_t executor) {
  CHECK_TENSORS(x, bias, out);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(out.floating() && out.same_shape(x), out, x);
  if (bias) CHECK(bias->floating() && bias->ndim == 1 && bias->dim(0) == x.dim(-1), bias, x);
  CHECK(approximate == "none" || approximate == "tanh", approximate);
  if (x.numel() == 0) return;

  GeluParams p{rows(x)};
  if (bias) p.bias = rows(*bias);
  p.out = rows(out);
  p.tanh_form = approximate == "tanh";
  RUN_KERNEL(gelu, p, x, executor);
}

void bind_activation(py::module_& m) {
  m.def("gelu", &gelu, py::arg("x"), py::arg("bias"), py::arg("out"), py::arg("approximate"),
        py::arg("executor"), nogil());
}

}  // namespace warpformer
