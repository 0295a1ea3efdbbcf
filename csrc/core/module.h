// What the binding at the end of every op.cpp needs.
#pragma once

#include "core/calls.h"
#include "core/python.h"
#ifdef WARPFORMER_EMULATED
#include "emulator/emulator.h"
#endif

namespace warpformer {

namespace py = pybind11;

/// The op runs without Python's global lock; its tensors have been read by then.
#ifdef WARPFORMER_EMULATED
using nogil = py::call_guard<py::gil_scoped_release, emulator::Call>;
#else
using nogil = py::call_guard<py::gil_scoped_release>;
#endif

}  // namespace warpformer
