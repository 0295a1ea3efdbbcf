#include "core/python.h"

#include <string_view>

#include "core/calls.h"
#include "core/check.h"
#ifdef WARPFORMER_EMULATED
#include "emulator/emulator.h"
#endif

namespace py = pybind11;

namespace warpformer {
namespace {

py::handle torch_tensor, numpy_array;  // the types, once their modules have been imported

DType dtype_named(std::string_view name) {
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  if (name == "int8") return DType::i8;
  if (name == "uint8") return DType::u8;
  if (name == "int32") return DType::i32;
  if (name == "int64") return DType::i64;
  if (name == "bool") return DType::boolean;
  return DType::unsupported;
}

/// Python's dtype objects are immortal singletons: the last few are known by address.
DType torch_dtype(py::handle dtype) {
  struct Known {
    PyObject* object;
    DType dtype;
  };
  static Known known[8] = {};
  for (const Known& k : known)
    if (k.object == dtype.ptr()) return k.dtype;
  const std::string name = py::str(dtype);  // "torch.float32"
  const DType result = dtype_named(std::string_view(name).substr(name.find('.') + 1));
  for (Known& k : known) {
    if (k.object) continue;
    k = {dtype.inc_ref().ptr(), result};
    break;
  }
  return result;
}

/// An attribute name, made once: looking one up is most of what a call costs.
struct Name {
  PyObject* text;
  explicit Name(const char* name) : text(PyUnicode_InternFromString(name)) {}

  py::object of(py::handle object) const { return checked(PyObject_GetAttr(object.ptr(), text)); }
  py::object call(py::handle object) const {
    return checked(PyObject_CallMethodNoArgs(object.ptr(), text));
  }

 private:
  static py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
};

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void set_dims(Tensor& t, py::handle shape, py::handle stride, int64_t stride_unit) {
  const auto sizes = py::reinterpret_borrow<py::tuple>(shape);
  const auto strides = py::reinterpret_borrow<py::tuple>(stride);
  if (sizes.size() > kMaxDims)
    throw InputError("a tensor of shape " + std::string(py::str(shape)) + " has more than " +
                     std::to_string(kMaxDims) + " dimensions");
  t.ndim = static_cast<int>(sizes.size());
  for (int i = 0; i < t.ndim; ++i) {
    t.shape[i] = integer(PyTuple_GET_ITEM(sizes.ptr(), i));
    t.stride[i] = integer(PyTuple_GET_ITEM(strides.ptr(), i)) / stride_unit;
  }
}

/// Subclasses that interpret operations themselves (FakeTensor, DTensor) have no memory that is
/// theirs, yet some give an address.
bool has_own_dispatch(py::handle object) {
  static const py::handle plain = py::object(torch_tensor.attr("__torch_dispatch__")).release();
  const py::handle type = py::type::handle_of(object);
  return !type.is(torch_tensor) && !py::object(type.attr("__torch_dispatch__")).is(plain);
}

Tensor view_torch(py::handle object) {
  static const Name shape("shape"), stride("stride"), dtype("dtype"), is_cpu("is_cpu"),
      data_ptr("data_ptr");
  Tensor t;
  t.dtype = torch_dtype(dtype.of(object));
  try {
    set_dims(t, shape.of(object), stride.call(object), 1);
  } catch (py::error_already_set& error) {
    // A layout without sizes or strides (sparse, nested): CHECK_TENSORS refuses it by name.
    if (!error.matches(PyExc_RuntimeError)) throw;
    t.dtype = DType::unsupported;
    return t;
  }
  if (!is_cpu.of(object).cast<bool>()) {
    const py::object device = object.attr("device");
    const std::string type = py::str(device.attr("type"));
    t.device.type = type == "cuda" ? DeviceType::cuda : DeviceType::unsupported;
    if (!device.attr("index").is_none()) t.device.index = device.attr("index").cast<int>();
    if (t.device.type == DeviceType::unsupported) return t;
  }
  if (has_own_dispatch(object)) return t;
  try {
    t.data = reinterpret_cast<void*>(data_ptr.call(object).cast<uintptr_t>());
  } catch (py::error_already_set& error) {
    // A functorch wrapper: no memory to read. CHECK_TENSORS says so with the tensor's name;
    // anything else (KeyboardInterrupt) goes on.
    if (!error.matches(PyExc_RuntimeError)) throw;
  }
  return t;
}

Tensor view_numpy(py::handle object) {
  Tensor t;
  const auto item = object.attr("itemsize").cast<int64_t>();
  set_dims(t, object.attr("shape"), object.attr("strides"), item ? item : 1);
  const py::object dtype = object.attr("dtype");
  t.dtype = dtype.attr("isnative").cast<bool>() ? dtype_named(std::string(py::str(dtype)))
                                                : DType::unsupported;
  for (int i = 0; i < t.ndim && item; ++i)
    if (object.attr("strides").attr("__getitem__")(i).cast<int64_t>() % item)
      t.dtype = DType::unsupported;  // a field of packed records: between two elements
  t.data = reinterpret_cast<void*>(
      object.attr("__array_interface__")["data"].attr("__getitem__")(0).cast<uintptr_t>());
  return t;
}

/// In the tests' emulated build, kernels may touch the tensors of the call and nothing else.
Tensor registered(const Tensor& t) {
#ifdef WARPFORMER_EMULATED
  int64_t first = 0, last = 0;  // elements, from t.data
  for (int i = 0; i < t.ndim; ++i) {
    const int64_t reach = (t.shape[i] - 1) * t.stride[i];
    (reach < 0 ? first : last) += reach;
  }
  if (t.data && t.numel() > 0)
    emulator::register_global(t.ptr<char>() + first * t.item_size(),
                              static_cast<size_t>(last - first + 1) * t.item_size());
#endif
  return t;
}

/// The type `name` of `module`, or null while nobody has imported that module.
py::handle type_of(const char* module, const char* name) {
  const py::object modules = py::module_::import("sys").attr("modules");
  const py::object found = modules.attr("get")(module);
  if (found.is_none()) return {};
  return py::object(found.attr(name)).release();  // kept: it lives as long as we do
}

bool is_a(py::handle object, py::handle& type, const char* module, const char* name) {
  if (!type) type = type_of(module, name);
  return type && PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr()));
}

}  // namespace

Tensor view(py::handle object) {
  if (Calls* calls = Calls::recording()) calls->keep(object);
  if (is_a(object, torch_tensor, "torch", "Tensor")) return registered(view_torch(object));
  if (is_a(object, numpy_array, "numpy", "ndarray")) return registered(view_numpy(object));
  throw py::type_error("expected a torch.Tensor or a numpy.ndarray, got " +
                       std::string(py::str(py::type::of(object).attr("__name__"))));
}

}  // namespace warpformer
