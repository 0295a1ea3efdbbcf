#include "linear/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

}  // namespace

void pack_linear(const Tensor& weight, const Tensor& packed, int64_t executor) {
  CHECK_TENSORS(weight, packed);
  CHECK(weight.floating() && weight.ndim == 2, weight);
  CHECK(packed.dtype == DType::f32 && packed.ndim == 3 && packed.contiguous(), packed);
  CHECK(packed.dim(0) == panels(weight.dim(0)) && packed.dim(1) == weight.dim(1) &&
            packed.dim(2) == kPanel,
        packed, weight);
  if (packed.numel() == 0) return;

  PackLinearParams p{rows(weight), packed.ptr<float>()};
  RUN_CPU_KERNEL(pack_linear, p, weight, executor);
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, const Tensor& out, const std::string& activation,
            int64_t executor) {
  CHECK_TENSORS(x, weight, bias, residual, out);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(weight.dtype == DType::f32 && weight.ndim == 3 && weight.contiguous() &&
            weight.dim(2) == kPanel,
        weight);
  CHECK(x.dim(-1) == weight.dim(1), x, weight);
  CHECK(out.floating() && out.ndim == x.ndim && panels(out.dim(-1)) == weight.dim(0), out, x,
        weight);
  for (int i = 0; i + 1 < x.ndim; ++i) CHECK(out.dim(i) == x.dim(i), out, x);
  if (bias) CHECK(bias->floating() && bias->ndim == 1 && bias->dim(0) == out.dim(-1), bias, out);
  if (residual) CHECK(residual->floating() && residual->same_shape(out), residual, out);
  LinearParams p{rows(x)};
  CHECK(is_activation(activation.c_str(), p.activation), activation);
  if (out.numel() == 0) return;

  if (bias) p.bias = rows(*bias);
  if (residual) p.residual = rows(*residual);
  p.out = rows(out);
  p.weight = weight.ptr<float>();
  RUN_CPU_KERNEL(linear, p, x, executor);
}

void bind_linear(py::module_& m) {
  m.def("pack_linear", &pack_linear, py::arg("weight"), py::arg("packed"), py::arg("executor"),
        nogil());
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("out"), py::arg("activation"), py::arg("executor"), nogil());
}

}  // namespace warpformer
