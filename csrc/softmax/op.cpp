#include "softmax/op.h"

#include <algorithm>

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

bool is_like(const std::optional<Tensor>& t, const Tensor& x) {
  return !t || (t->floating() && t->same_shape(x));
}
bool is_mask(const std::optional<Tensor>& t, const Tensor& x) {
  return !t || ((t->floating() || t->dtype == DType::boolean) && t->same_shape(x));
}
/// Whether rows of x along `dim` are keys, and the dimension before them is queries.
bool are_scores(const Tensor& x, int dim) {
  return x.ndim >= 2 && (dim == -1 || dim == x.ndim - 1);
}
bool is_reduced(const std::optional<Tensor>& dmask, const Tensor& out, int dim) {
  return !dmask || (dmask->floating() && dmask->ndim == 2 && dmask->dim(1) == out.dim(dim) &&
                    (dmask->numel() == 0 || out.numel() % dmask->numel() == 0));
}
bool are_parts(const std::optional<Tensor>& parts, const std::optional<Tensor>& dmask) {
  if (!parts || !dmask) return !parts && !dmask;
  return parts->dtype == DType::f32 && parts->contiguous() && parts->ndim == 3 &&
         parts->dim(0) > 0 && parts->dim(1) == dmask->dim(0) && parts->dim(2) == dmask->dim(1);
}

SoftmaxParams params(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& out, int dim,
                     double scale, bool causal) {
  SoftmaxParams p{rows(x, dim), rows(out, dim)};
  p.mask = mask ? rows(*mask, dim) : p.out;
  p.has_mask = mask.has_value();
  p.scale = static_cast<float>(scale);
  p.queries = causal ? x.dim(-2) : 0;
  p.run = std::min(common_run(p.x, p.out), common_run(p.x, p.mask));
  return p;
}

SoftmaxBackwardParams backward_params(const Tensor& grad, const Tensor& out,
                                      const std::optional<Tensor>& dx,
                                      const std::optional<Tensor>& dmask,
                                      const std::optional<Tensor>& parts, int dim, double scale) {
  SoftmaxBackwardParams p{rows(grad, dim), rows(out, dim)};
  p.dx = dx ? rows(*dx, dim) : p.out;
  p.has_dx = dx.has_value();
  p.scale = static_cast<float>(scale);
  p.run = std::min(common_run(p.grad, p.out), common_run(p.out, p.dx));
  if (dmask) {
    p.masks = dmask->dim(0);
    p.parts = parts->dim(0);
    p.part = rows(*parts);
    p.dmask = rows(*dmask);
  }
  return p;
}

}  // namespace

void softmax(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& out, int dim,
             double scale, bool causal, int64_t executor) {
  CHECK_TENSORS(x, mask, out);
  CHECK(x.floating(), x);
  CHECK(is_like(out, x), out, x);
  CHECK(x.dim(dim) >= 0, dim, x);
  CHECK(is_mask(mask, x), mask, x);
  CHECK(!causal || are_scores(x, dim), causal, dim, x);
  if (x.numel() == 0) return;

  const SoftmaxParams p = params(x, mask, out, dim, scale, causal);
  RUN_KERNEL(softmax, p, x, executor);
}

void log_softmax(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& out, int dim,
                 double scale, bool causal, int64_t executor) {
  CHECK_TENSORS(x, mask, out);
  CHECK(x.floating(), x);
  CHECK(is_like(out, x), out, x);
  CHECK(x.dim(dim) >= 0, dim, x);
  CHECK(is_mask(mask, x), mask, x);
  CHECK(!causal || are_scores(x, dim), causal, dim, x);
  if (x.numel() == 0) return;

  SoftmaxParams p = params(x, mask, out, dim, scale, causal);
  p.log = true;
  RUN_KERNEL(softmax, p, x, executor);
}

void softmax_backward(const Tensor& grad, const Tensor& out, const std::optional<Tensor>& dx,
                      const std::optional<Tensor>& dmask, const std::optional<Tensor>& parts,
                      int dim, double scale, int64_t executor) {
  CHECK_TENSORS(grad, out, dx, dmask, parts);
  CHECK(out.floating(), out);
  CHECK(is_like(grad, out), grad, out);
  CHECK(out.dim(dim) >= 0, dim, out);
  CHECK(is_like(dx, out), dx, out);
  CHECK(is_reduced(dmask, out, dim), dmask, out);
  CHECK(are_parts(parts, dmask), parts, dmask);
  if (out.numel() == 0) return;

  const auto p = backward_params(grad, out, dx, dmask, parts, dim, scale);
  RUN_KERNEL(softmax_backward, p, out, executor);
}

void log_softmax_backward(const Tensor& grad, const Tensor& out, const std::optional<Tensor>& dx,
                          const std::optional<Tensor>& dmask, const std::optional<Tensor>& parts,
                          int dim, double scale, int64_t executor) {
  CHECK_TENSORS(grad, out, dx, dmask, parts);
  CHECK(out.floating(), out);
  CHECK(is_like(grad, out), grad, out);
  CHECK(out.dim(dim) >= 0, dim, out);
  CHECK(is_like(dx, out), dx, out);
  CHECK(is_reduced(dmask, out, dim), dmask, out);
  CHECK(are_parts(parts, dmask), parts, dmask);
  if (out.numel() == 0) return;

  auto p = backward_params(grad, out, dx, dmask, parts, dim, scale);
  p.log = true;
  RUN_KERNEL(softmax_backward, p, out, executor);
}

void bind_softmax(py::module_& m) {
  const auto forward = [&](const char* name, auto function) {
    m.def(name, op(function), py::arg("x"), py::arg("mask"), py::arg("out"), py::arg("dim"),
          py::arg("scale"), py::arg("causal"), py::arg("executor"), nogil());
  };
  const auto backward = [&](const char* name, auto function) {
    m.def(name, op(function), py::arg("grad"), py::arg("out"), py::arg("dx"), py::arg("dmask"),
          py::arg("parts"), py::arg("dim"), py::arg("scale"), py::arg("executor"), nogil());
  };
  forward("softmax", &softmax);
  forward("log_softmax", &log_softmax);
  backward("softmax_backward", &softmax_backward);
  backward("log_softmax_backward", &log_softmax_backward);
}

}  // namespace warpformer
