#include "softmax/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {

void softmax(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& out, int dim,
             double scale, bool causal, bool log, int64_t executor) {
  CHECK_TENSORS(x, mask, out);
  CHECK(x.floating(), x);
  CHECK(out.floating() && out.same_shape(x), out, x);
  CHECK(x.dim(dim) >= 0, dim, x);
  if (mask) {
    CHECK((mask->floating() || mask->dtype == DType::boolean) && mask->same_shape(x), mask, x);
  }
  CHECK(!causal || (x.ndim >= 2 && (dim == -1 || dim == x.ndim - 1)), causal, dim, x);
  if (x.numel() == 0) return;

  SoftmaxParams p{rows(x, dim), rows(out, dim)};
  p.mask = mask ? rows(*mask, dim) : p.out;
  p.has_mask = mask.has_value();
  p.log = log;
  p.scale = static_cast<float>(scale);
  p.queries = causal ? x.dim(-2) : 0;
  p.run = common_run({p.x, p.out, p.mask});
  RUN_KERNEL(softmax, p, x, executor);
}

void softmax_backward(const Tensor& grad, const Tensor& out, const std::optional<Tensor>& dx,
                      const std::optional<Tensor>& dmask, const std::optional<Tensor>& parts,
                      int dim, double scale, bool log, int64_t executor) {
  CHECK_TENSORS(grad, out, dx, dmask, parts);
  CHECK(out.floating(), out);
  CHECK(grad.floating() && grad.same_shape(out), grad, out);
  CHECK(out.dim(dim) >= 0, dim, out);
  if (dx) CHECK(dx->floating() && dx->same_shape(out), dx, out);
  CHECK(dmask.has_value() == parts.has_value(), dmask, parts);
  if (out.numel() == 0) return;

  SoftmaxBackwardParams p{rows(grad, dim), rows(out, dim)};
  p.dx = dx ? rows(*dx, dim) : p.out;
  p.has_dx = dx.has_value();
  p.log = log;
  p.scale = static_cast<float>(scale);
  p.run = common_run({p.grad, p.out, p.dx});
  if (dmask) {
    CHECK(dmask->floating() && dmask->ndim == 2 && dmask->dim(1) == out.dim(dim), dmask, out);
    CHECK(dmask->dim(0) > 0 && p.out.count % dmask->dim(0) == 0, dmask, out);
    CHECK(parts->dtype == DType::f32 && parts->contiguous() && parts->ndim == 3, parts);
    CHECK(parts->dim(0) > 0 && parts->dim(1) == dmask->dim(0), parts, dmask);
    CHECK(parts->dim(2) == dmask->dim(1), parts, dmask);
    p.masks = dmask->dim(0);
    p.parts = parts->dim(0);
    p.part = parts->ptr<float>();
    p.dmask = rows(*dmask);
  }
  RUN_KERNEL(softmax_backward, p, out, executor);
}

void bind_softmax(py::module_& m) {
  for (const bool log : {false, true}) {
    m.def(
        log ? "log_softmax" : "softmax",
        [log](const Tensor& x, const std::optional<Tensor>& mask, const Tensor& out, int dim,
              double scale, bool causal, int64_t executor) {
          softmax(x, mask, out, dim, scale, causal, log, executor);
        },
        py::arg("x"), py::arg("mask"), py::arg("out"), py::arg("dim"), py::arg("scale"),
        py::arg("causal"), py::arg("executor"), nogil());
    m.def(
        log ? "log_softmax_backward" : "softmax_backward",
        [log](const Tensor& grad, const Tensor& out, const std::optional<Tensor>& dx,
              const std::optional<Tensor>& dmask, const std::optional<Tensor>& parts, int dim,
              double scale, int64_t executor) {
          softmax_backward(grad, out, dx, dmask, parts, dim, scale, log, executor);
        },
        py::arg("grad"), py::arg("out"), py::arg("dx"), py::arg("dmask"), py::arg("parts"),
        py::arg("dim"), py::arg("scale"), py::arg("executor"), nogil());
  }
}

}  // namespace warpformer
