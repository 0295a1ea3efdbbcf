// A case: one kernel over one primitive, run by name from Python with arrays of bytes in and out.
// The same sources are built for a GPU (nvcc) and for the emulator (g++ -DWARPFORMER_EMULATED),
// with the C interface of entry.cu.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/cuda/bulk.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/matrix.cuh"
#include "core/cuda/ptx.cuh"
#include "core/cuda/wgmma.cuh"

namespace warpformer::conformance {

/// What a case gets: its inputs and its output in the memory of the device, and numbers.
struct Call {
  std::vector<const void*> inputs;
  void* result;
  int64_t result_bytes;
  std::vector<int64_t> numbers;
  cuda::Stream stream;

  template <class T>
  const T* input(size_t i) const {
    return static_cast<const T*>(inputs.at(i));
  }
  template <class T>
  T* output() const {
    return static_cast<T*>(result);
  }
  int64_t number(size_t i) const { return numbers.at(i); }
};

using Case = void (*)(const Call&);

inline std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

/// CASE(name) { LAUNCH(...call.input<float>(0)...); } runs under its name and the file's prefix, if
/// any.
struct Registration {
  Registration(const std::string& name, Case function) { cases().emplace(name, function); }
};
#define CASE(name)                                                                              \
  static void case_##name(const ::warpformer::conformance::Call&);                              \
  static const ::warpformer::conformance::Registration registration_##name(#name, case_##name); \
  static void case_##name([[maybe_unused]] const ::warpformer::conformance::Call& call)

}  // namespace warpformer::conformance
