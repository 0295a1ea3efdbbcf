// The only code that knows what a tensor object is: reads torch.Tensor and numpy.ndarray by their
// Python attributes, so that the extension links neither.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/tensor.h"

namespace warpformer {

/// Views `object`. Throws TypeError where it is neither a torch.Tensor nor a numpy.ndarray, and
/// InputError where its memory cannot be read (a FakeTensor, more than kMaxDims dimensions).
Tensor view(pybind11::handle object);

}  // namespace warpformer

namespace pybind11::detail {

template <>
struct type_caster<warpformer::Tensor> {
  PYBIND11_TYPE_CASTER(warpformer::Tensor, const_name("torch.Tensor | numpy.ndarray"));
  bool load(handle source, bool) {
    if (source.is_none()) return false;
    value = warpformer::view(source);
    return true;
  }
};

}  // namespace pybind11::detail
