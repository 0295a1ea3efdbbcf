#include "activation/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

using Optional = std::optional<Tensor>;

template <class... Tensors>
bool all_contiguous(const Tensors&... tensors) {
  return (... && (!tensor_in(tensors) || tensor_in(tensors)->contiguous()));
}

bool is_row_of(const Optional& bias, const Tensor& x) {
  return !bias || (bias->floating() && bias->ndim == 1 && bias->dim(0) == x.dim(-1));
}

bool is_like(const Optional& t, const Tensor& x) {
  return !t || (t->floating() && t->same_shape(x));
}

/// Without a bias columns mean nothing: where memory allows, everything is one row.
Rows view(const Optional& t, bool as_one_row) {
  if (!t) return {};
  return as_one_row ? flat(*t) : rows(*t);
}

}  // namespace

void activation(const Tensor& x, const Optional& up, const Optional& bias, const Optional& up_bias,
                const Tensor& out, const std::string& activation, int64_t executor) {
  CHECK_TENSORS(x, up, bias, up_bias, out);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(is_like(up, x), up, x);
  CHECK(is_row_of(bias, x), bias, x);
  CHECK(is_row_of(up_bias, x) && (up || !up_bias), up_bias, up, x);
  CHECK(is_like(out, x), out, x);
  ActivationParams p{};
  CHECK(is_activation(activation.c_str(), p.activation), activation);
  if (x.numel() == 0) return;

  const bool one = !bias && !up_bias && all_contiguous(x, up, out);
  p.x = view(x, one);
  p.up = view(up, one);
  p.bias = view(bias, false);
  p.up_bias = view(up_bias, false);
  p.out = view(out, one);
  RUN_KERNEL(activation, p, x, executor);
}

void activation_backward(const Tensor& grad, const Tensor& x, const Optional& up,
                         const Optional& bias, const Optional& up_bias, const Optional& dx,
                         const Optional& dup, const Optional& dbias, const Optional& dup_bias,
                         const Optional& partial, const std::string& activation, int64_t executor) {
  CHECK_TENSORS(x, grad, up, bias, up_bias, dx, dup, dbias, dup_bias, partial);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(is_like(grad, x), grad, x);
  CHECK(is_like(up, x), up, x);
  CHECK(is_row_of(bias, x), bias, x);
  CHECK(is_row_of(up_bias, x) && (up || !up_bias), up_bias, up, x);
  CHECK(is_like(dx, x), dx, x);
  CHECK(is_like(dup, x) && (up || !dup), dup, up, x);
  CHECK(is_row_of(dbias, x) && (bias || !dbias), dbias, bias, x);
  CHECK(is_row_of(dup_bias, x) && (up_bias || !dup_bias), dup_bias, up_bias, x);
  const bool sums = dbias || dup_bias;
  CHECK(sums == partial.has_value(), partial, dbias, dup_bias);
  if (partial)
    CHECK(partial->dtype == DType::f32 && partial->contiguous() && partial->ndim == 3 &&
              partial->dim(0) > 0 && partial->dim(1) == 2 && partial->dim(2) == x.dim(-1),
          partial, x);
  ActivationBackwardParams p{};
  CHECK(is_activation(activation.c_str(), p.activation), activation);
  if (x.dim(-1) == 0 || (x.numel() == 0 && !sums)) return;

  const bool one = !bias && !up_bias && all_contiguous(x, grad, up, dx, dup);
  p.grad = view(grad, one);
  p.x = view(x, one);
  p.up = view(up, one);
  p.bias = view(bias, false);
  p.up_bias = view(up_bias, false);
  p.dx = view(dx, one);
  p.dup = view(dup, one);
  p.dbias = view(dbias, false);
  p.dup_bias = view(dup_bias, false);
  if (partial) {
    p.partial = partial->ptr<float>();
    p.parts = partial->dim(0);
  }
  RUN_KERNEL(activation_backward, p, x, executor);
}

void bind_activation(py::module_& m) {
  m.def("activation", op(&activation), py::arg("x"), py::arg("up"), py::arg("bias"),
        py::arg("up_bias"), py::arg("out"), py::arg("activation"), py::arg("executor"), nogil());
  m.def("activation_backward", op(&activation_backward), py::arg("grad"), py::arg("x"),
        py::arg("up"), py::arg("bias"), py::arg("up_bias"), py::arg("dx"), py::arg("dup"),
        py::arg("dbias"), py::arg("dup_bias"), py::arg("partial"), py::arg("activation"),
        py::arg("executor"), nogil());
}

}  // namespace warpformer
