// warpformer._emulated: the ops that have CUDA kernels, under their names in _C, and the kernels of
// the emulator's own tests.
#include "core/module.h"

#include "core/check.h"
#include "emulator/emulator.h"

namespace warpformer {

#define WF_OP(name) void bind_##name(py::module_& m);
#define WF_KERNELS(name)            \
  namespace emulator {              \
  void bind_##name(py::module_& m); \
  }
#include "emulated.inc"
#undef WF_OP
#undef WF_KERNELS

}  // namespace warpformer

PYBIND11_MODULE(_emulated, m) {
  using namespace warpformer;
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const InputError& error) {
      const py::object type = py::module_::import("warpformer._C").attr("InputError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
  m.def("set_schedule", &emulator::set_schedule, py::arg("schedule"));
  m.def("set_resident_blocks", &emulator::set_resident_blocks, py::arg("blocks"));
  m.def("set_compute_capability", &emulator::set_compute_capability, py::arg("capability"));
  py::module_ kernels = m.def_submodule("kernels");

#define WF_OP(name) bind_##name(m);
#define WF_KERNELS(name) emulator::bind_##name(kernels);
#include "emulated.inc"
#undef WF_OP
#undef WF_KERNELS
}
