// The extension module: InputError, the ISA in use, and every op of the list in CMakeLists.txt.
#include "core/module.h"

#include <omp.h>

#include "core/check.h"
#include "core/cuda/runtime.h"
#include "core/huge_pages.h"
#include "core/isa.h"

namespace warpformer {

#ifndef WARPFORMER_CUDA
int cuda::runtime_version() { return 0; }
int cuda::driver_version() { return 0; }
#endif

#define WF_OP(name) void bind_##name(py::module_& m);
#include "ops.inc"
#undef WF_OP

namespace {

/// InputError is a ValueError and a RuntimeError, so that code written for torch's errors catches
/// it.
py::object input_error() {
  static py::handle type;  // lives as long as the interpreter
  if (!type) {
    const py::tuple bases =
        py::make_tuple(py::handle(PyExc_ValueError), py::handle(PyExc_RuntimeError));
    type = PyErr_NewExceptionWithDoc("warpformer.InputError",
                                     "An argument has a shape, dtype or device the op cannot take.",
                                     bases.ptr(), nullptr);
    if (!type) throw py::error_already_set();
  }
  return py::reinterpret_borrow<py::object>(type);
}

}  // namespace
}  // namespace warpformer

PYBIND11_MODULE(_C, m) {
  using namespace warpformer;
  m.attr("InputError") = input_error();
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const InputError& error) {
      PyErr_SetString(input_error().ptr(), error.what());
    }
  });

  py::class_<Calls>(m, "Calls")
      .def(py::init<>())
      .def("record", &Calls::record)
      .def("stop", &Calls::stop)
      .def("run", &Calls::run, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &Calls::size);

  m.attr("__version__") = WARPFORMER_VERSION;
  m.attr("cuda_architectures") = WARPFORMER_CUDA_ARCHITECTURES;
  m.def("cuda_runtime_version", &cuda::runtime_version);
  m.def("cuda_driver_version", &cuda::driver_version);
  m.def("isa", [] { return isa_name(current_isa()); });
  m.def("best_isa", [] { return isa_name(best_isa()); });
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("fresh"));
  m.def("set_isa", &set_isa, py::arg("name"));
  // Of the calling thread alone: torch.set_num_threads sets MKL's, too, which all threads share.
  m.def("set_own_threads", &omp_set_num_threads, py::arg("threads"));
  // Those that wait for the calling thread's next loop. While a process has more of them than
  // cores, libgomp lets each fall asleep at once, also those of other threads, and waking one takes
  // longer than many kernels. The next loop has new ones.
  m.def("end_own_threads", [] { omp_pause_resource(omp_pause_soft, omp_get_initial_device()); });
  current_isa();  // an unknown WARPFORMER_ISA fails the import, not a call later

#define WF_OP(name) bind_##name(m);
#include "ops.inc"
#undef WF_OP
}
