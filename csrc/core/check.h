// The one way to refuse an input: prints the broken condition and the tensors that broke it.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "core/tensor.h"

namespace warpformer {

/// Becomes warpformer.InputError (a ValueError and a RuntimeError) in Python.
struct InputError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline std::string show(const Tensor& t) { return to_string(t); }
inline std::string show(const std::optional<Tensor>& t) { return t ? to_string(*t) : "None"; }
inline std::string show(const std::string& s) { return '"' + s + '"'; }
inline std::string show(double v) { return std::to_string(v); }
inline std::string show(int64_t v) { return std::to_string(v); }
inline std::string show(int v) { return std::to_string(v); }
inline std::string show(bool v) { return v ? "true" : "false"; }

/// Takes the next name of a macro's stringified argument list "a, b, c".
inline std::string next_name(const char*& names) {
  std::string name;
  while (*names && *names != ',') name += *names++;
  while (*names == ',' || *names == ' ') ++names;
  return name;
}

template <class... Values>
[[noreturn]] void fail(const char* op, const char* condition, const char* names,
                       const Values&... values) {
  std::string message = std::string(op) + ": " + condition + " failed: ";
  const char* separator = "";
  ((message += separator + next_name(names) + " = " + show(values), separator = ", "), ...);
  throw InputError(message);
}

inline const Tensor* tensor_in(const Tensor& t) { return &t; }
inline const Tensor* tensor_in(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

/// True where the tensors that are present can be used together: known dtypes, one CPU or CUDA
/// device, and memory behind every element (a FakeTensor has none).
template <class... Tensors>
bool usable(const Tensors&... tensors) {
  const Tensor* first = nullptr;
  bool ok = true;
  auto visit = [&](const Tensor* t) {
    if (!t) return;
    if (!first) first = t;
    ok = ok && t->dtype != DType::unsupported && t->device.type != DeviceType::unsupported &&
         t->device == first->device && (t->data || t->numel() == 0);
  };
  (visit(tensor_in(tensors)), ...);
  return ok;
}

/// CHECK(w.dim(0) == x.dim(-1), w, x): only in op.cpp, once for all devices.
#define CHECK(condition, ...) CHECK_FOR(__func__, condition, __VA_ARGS__)

/// The same under the name of the op that a function of several serves.
#define CHECK_FOR(op, condition, ...)                                                \
  do {                                                                               \
    if (!(condition)) ::warpformer::fail(op, #condition, #__VA_ARGS__, __VA_ARGS__); \
  } while (0)

/// First line of every op: dtypes known, one device, real memory.
#define CHECK_TENSORS(...)                                                                    \
  do {                                                                                        \
    if (!::warpformer::usable(__VA_ARGS__))                                                   \
      ::warpformer::fail(__func__, "one device, supported dtypes, real memory", #__VA_ARGS__, \
                         __VA_ARGS__);                                                        \
  } while (0)

/// The device choice of an op that has only a CPU kernel.
#define CHECK_CPU(x)                                                                               \
  do {                                                                                             \
    if ((x).device.type != ::warpformer::DeviceType::cpu)                                          \
      ::warpformer::fail(__func__, "a CPU tensor (there is no CUDA kernel in this build)", #x, x); \
  } while (0)

}  // namespace warpformer
