#include "norm/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

Rows rows_of(const std::optional<Tensor>& t) { return t ? rows(*t) : Rows{}; }
float* floats_of(const std::optional<Tensor>& t) { return t ? t->ptr<float>() : nullptr; }

/// One float for each row of x.
bool is_statistic(const std::optional<Tensor>& t, const Tensor& x) {
  return !t || (t->dtype == DType::f32 && t->contiguous() && t->numel() * x.dim(-1) == x.numel());
}
bool is_parameter(const std::optional<Tensor>& t, const Tensor& x) {
  return !t || (t->floating() && t->ndim == 1 && t->dim(0) == x.dim(-1));
}
bool is_like(const std::optional<Tensor>& t, const Tensor& x) {
  return !t || (t->floating() && t->same_shape(x));
}
bool is_sum(const std::optional<Tensor>& t, const Tensor& x,
            const std::optional<Tensor>& residual) {
  return !t || (residual && t->same_shape(x) &&
                t->dtype == (residual->dtype == x.dtype ? x.dtype : DType::f32));
}
bool are_partials(const std::optional<Tensor>& t, const Tensor& x, int64_t kinds) {
  return !t || (t->dtype == DType::f32 && t->contiguous() && t->ndim == 3 && t->dim(0) > 0 &&
                t->dim(1) == kinds && t->dim(2) == x.dim(-1));
}

}  // namespace

void layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& sum, const Tensor& out,
                const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd, double eps,
                int64_t executor) {
  CHECK_TENSORS(x, residual, weight, bias, sum, out, mean, rstd);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(is_like(residual, x), residual, x);
  CHECK(is_parameter(weight, x), weight, x);
  CHECK(is_parameter(bias, x), bias, x);
  CHECK(is_sum(sum, x, residual), sum, x, residual);
  CHECK(is_like(out, x), out, x);
  CHECK(is_statistic(mean, x), mean, x);
  CHECK(is_statistic(rstd, x), rstd, x);
  if (x.numel() == 0) return;

  NormParams p{true, rows(x), rows_of(residual), rows_of(weight), rows_of(bias), rows_of(sum)};
  p.out = rows(out);
  p.mean = floats_of(mean);
  p.rstd = floats_of(rstd);
  p.eps = static_cast<float>(eps);
  RUN_KERNEL(norm, p, x, executor);
}

void rms_norm(const Tensor& x, const std::optional<Tensor>& residual,
              const std::optional<Tensor>& weight, const std::optional<Tensor>& sum,
              const Tensor& out, const std::optional<Tensor>& rstd, double eps, int64_t executor) {
  CHECK_TENSORS(x, residual, weight, sum, out, rstd);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(is_like(residual, x), residual, x);
  CHECK(is_parameter(weight, x), weight, x);
  CHECK(is_sum(sum, x, residual), sum, x, residual);
  CHECK(is_like(out, x), out, x);
  CHECK(is_statistic(rstd, x), rstd, x);
  if (x.numel() == 0) return;

  NormParams p{false, rows(x), rows_of(residual), rows_of(weight), Rows{}, rows_of(sum)};
  p.out = rows(out);
  p.rstd = floats_of(rstd);
  p.eps = static_cast<float>(eps);
  RUN_KERNEL(norm, p, x, executor);
}

void layer_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& z,
                         const std::optional<Tensor>& weight, const Tensor& mean,
                         const Tensor& rstd, const std::optional<Tensor>& dz,
                         const std::optional<Tensor>& dweight, const std::optional<Tensor>& dbias,
                         const std::optional<Tensor>& partials, int64_t executor) {
  CHECK_TENSORS(grad, grad_sum, z, weight, mean, rstd, dz, dweight, dbias, partials);
  CHECK(z.floating() && z.ndim > 0, z);
  CHECK(is_like(grad, z), grad, z);
  CHECK(is_like(grad_sum, z), grad_sum, z);
  CHECK(is_parameter(weight, z), weight, z);
  CHECK(is_statistic(mean, z), mean, z);
  CHECK(is_statistic(rstd, z), rstd, z);
  CHECK(is_like(dz, z), dz, z);
  CHECK(is_parameter(dweight, z), dweight, z);
  CHECK(is_parameter(dbias, z), dbias, z);
  CHECK(are_partials(partials, z, 2), partials, z);
  CHECK(partials || (!dweight && !dbias), partials, dweight, dbias);
  if (z.dim(-1) == 0) return;

  NormBackwardParams p{true, rows(grad), rows_of(grad_sum), rows(z), rows_of(weight)};
  p.mean = mean.ptr<float>();
  p.rstd = rstd.ptr<float>();
  p.dz = rows_of(dz);
  p.dweight = rows_of(dweight);
  p.dbias = rows_of(dbias);
  p.partials = floats_of(partials);
  p.parts = partials ? partials->dim(0) : p.z.count;
  RUN_KERNEL(norm_backward, p, z, executor);
}

void rms_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& z,
                       const std::optional<Tensor>& weight, const Tensor& rstd,
                       const std::optional<Tensor>& dz, const std::optional<Tensor>& dweight,
                       const std::optional<Tensor>& partials, int64_t executor) {
  CHECK_TENSORS(grad, grad_sum, z, weight, rstd, dz, dweight, partials);
  CHECK(z.floating() && z.ndim > 0, z);
  CHECK(is_like(grad, z), grad, z);
  CHECK(is_like(grad_sum, z), grad_sum, z);
  CHECK(is_parameter(weight, z), weight, z);
  CHECK(is_statistic(rstd, z), rstd, z);
  CHECK(is_like(dz, z), dz, z);
  CHECK(is_parameter(dweight, z), dweight, z);
  CHECK(are_partials(partials, z, 1), partials, z);
  CHECK(partials || !dweight, partials, dweight);
  if (z.dim(-1) == 0) return;

  NormBackwardParams p{false, rows(grad), rows_of(grad_sum), rows(z), rows_of(weight)};
  p.rstd = rstd.ptr<float>();
  p.dz = rows_of(dz);
  p.dweight = rows_of(dweight);
  p.partials = floats_of(partials);
  p.parts = partials ? partials->dim(0) : p.z.count;
  RUN_KERNEL(norm_backward, p, z, executor);
}

void bind_norm(py::module_& m) {
  m.def("layer_norm", op(&layer_norm), py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("sum"), py::arg("out"), py::arg("mean"), py::arg("rstd"),
        py::arg("eps"), py::arg("executor"), nogil());
  m.def("rms_norm", op(&rms_norm), py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("sum"), py::arg("out"), py::arg("rstd"), py::arg("eps"), py::arg("executor"),
        nogil());
  m.def("layer_norm_backward", op(&layer_norm_backward), py::arg("grad"), py::arg("grad_sum"),
        py::arg("z"), py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("dz"),
        py::arg("dweight"), py::arg("dbias"), py::arg("partials"), py::arg("executor"), nogil());
  m.def("rms_norm_backward", op(&rms_norm_backward), py::arg("grad"), py::arg("grad_sum"),
        py::arg("z"), py::arg("weight"), py::arg("rstd"), py::arg("dz"), py::arg("dweight"),
        py::arg("partials"), py::arg("executor"), nogil());
}

}  // namespace warpformer
