#include "cross_entropy/op.h"

#include <string>
#include <vector>

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

/// Whether t has the shape of x without dimension `dim`.
bool is_target_of(const Tensor& t, const Tensor& x, int dim) {
  bool same = t.ndim == x.ndim - 1;
  for (int i = 0; same && i < t.ndim; ++i) same = t.shape[i] == x.shape[i + (i >= dim)];
  return same;
}

int class_dim(const Tensor& x) { return x.ndim == 1 ? 0 : 1; }

}  // namespace

void cross_entropy(const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
                   const Tensor& loss, const std::optional<Tensor>& dx, const Tensor& work,
                   int64_t ignored, const std::string& reduction, double smoothing, double z_loss,
                   int64_t executor) {
  CHECK_TENSORS(x, target, weight, loss, dx, work);
  CHECK(x.floating() && x.ndim >= 1, x);
  const int dim = class_dim(x);
  CHECK(target.dtype == DType::i64 || target.dtype == DType::i32, target);
  CHECK(is_target_of(target, x, dim) && target.contiguous(), target, x);
  if (weight)
    CHECK(weight->floating() && weight->ndim == 1 && weight->dim(0) == x.dim(dim), weight, x);
  CHECK(reduction == "none" || reduction == "mean" || reduction == "sum", reduction);
  const bool reduced = reduction != "none";
  CHECK(loss.floating() && (reduced ? loss.ndim == 0 : loss.same_shape(target)), loss, target);
  if (dx) CHECK(dx->floating() && dx->same_shape(x), dx, x);
  CHECK(work.dtype == DType::i64 && work.contiguous() && work.numel() == target.numel() + 1, work,
        target);
  CHECK(smoothing >= 0 && smoothing <= 1, smoothing);
  CHECK(x.dim(dim) > 0 || target.numel() == 0, x);
  if (!reduced && loss.numel() == 0) return;

  std::vector<int64_t> checked;
  if (runs_on_cpu(x)) {
    for (int64_t r = 0; r < target.numel(); ++r) {
      const int64_t y =
          target.dtype == DType::i64 ? target.ptr<int64_t>()[r] : target.ptr<int32_t>()[r];
      CHECK(y == ignored || (y >= 0 && y < x.dim(dim)), y, target, x);
      checked.push_back(y);
    }
  }
  CrossEntropyParams p{rows(x, dim), rows(dx.value_or(x), dim), dx.has_value()};
  p.target = runs_on_cpu(x) ? checked.data() : target.data;
  p.wide = runs_on_cpu(x) || target.dtype == DType::i64;
  p.ignored = ignored;
  p.weight = weight ? rows(*weight) : Rows{};
  p.has_weight = weight.has_value();
  p.loss = elements(loss);
  p.reduced = reduced;
  p.mean = reduction == "mean";
  p.smoothing = smoothing;
  p.z_loss = z_loss;
  p.row_loss = work.ptr<double>();
  p.scale = p.row_loss + target.numel();
  p.run = common_run(p.x, p.dx);
  RUN_KERNEL(cross_entropy, p, x, executor);
}

void cross_entropy_backward(const Tensor& dx, const Tensor& grad, const Tensor& out,
                            int64_t executor) {
  CHECK_TENSORS(dx, grad, out);
  CHECK(dx.floating() && dx.ndim >= 1, dx);
  CHECK(out.floating() && out.same_shape(dx), out, dx);
  const int dim = class_dim(dx);
  CHECK(grad.floating() && (grad.ndim == 0 || is_target_of(grad, dx, dim)), grad, dx);
  if (dx.numel() == 0) return;

  CrossEntropyBackwardParams p{rows(dx, dim), rows(out, dim), elements(grad)};
  RUN_KERNEL(cross_entropy_backward, p, dx, executor);
}

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", op(&cross_entropy), py::arg("x"), py::arg("target"), py::arg("weight"),
        py::arg("loss"), py::arg("dx"), py::arg("work"), py::arg("ignored"), py::arg("reduction"),
        py::arg("smoothing"), py::arg("z_loss"), py::arg("executor"), nogil());
  m.def("cross_entropy_backward", op(&cross_entropy_backward), py::arg("dx"), py::arg("grad"),
        py::arg("out"), py::arg("executor"), nogil());
}

}  // namespace warpformer
