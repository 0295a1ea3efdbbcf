#include "softmax/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {

void softmax(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& out, int dim,
             double scale, int64_t executor) {
  CHECK_TENSORS(x, mask, out);
  CHECK(x.floating(), x);
  CHECK(out.floating() && out.same_shape(x), out, x);
  CHECK(x.dim(dim) >= 0, dim, x);
  if (mask) {
    CHECK((mask->floating() || mask->dtype == DType::boolean) && mask->same_shape(x), mask, x);
  }
  if (x.numel() == 0) return;

  SoftmaxParams p{rows(x, dim), rows(out, dim)};
  p.has_mask = mask.has_value();
  if (mask) p.mask = rows(*mask, dim);
  p.scale = static_cast<float>(scale);
  RUN_KERNEL(softmax, p, x, executor);
}

void bind_softmax(py::module_& m) {
  m.def("softmax", &softmax, py::arg("x"), py::arg("mask"), py::arg("out"), py::arg("dim"),
        py::arg("scale"), py::arg("executor"), nogil());
}

}  // namespace warpformer
