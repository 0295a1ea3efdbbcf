// What the binding at the end of every op.cpp needs.
#pragma once

#include "core/python.h"

namespace warpformer {

namespace py = pybind11;

/// The op runs without Python's global lock; its tensors have been read by then.
using nogil = py::call_guard<py::gil_scoped_release>;

}  // namespace warpformer
