// A view of memory that somebody else owns: what every op gets, whatever library made the array.
#pragma once

#include <cstdint>
#include <string>

#include "core/types.h"

namespace warpformer {

enum class DeviceType : uint8_t { cpu, cuda, unsupported };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

constexpr int kMaxDims = 8;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements; 0 where broadcast, negative where reversed

  /// Size of dimension `i`; -1 is the last one. A dimension that is not there has size -1, so that
  /// a CHECK on it fails instead of reading past the end.
  int64_t dim(int i) const {
    if (i < 0) i += ndim;
    return i >= 0 && i < ndim ? shape[i] : -1;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  /// Bytes of an element.
  int64_t item_size() const {
    switch (dtype) {
      case DType::f16:
      case DType::bf16:
        return 2;
      case DType::f32:
      case DType::i32:
        return 4;
      case DType::i64:
        return 8;
      default:
        return 1;
    }
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  bool same_shape(const Tensor& other) const {
    bool same = ndim == other.ndim;
    for (int i = 0; same && i < ndim; ++i) same = shape[i] == other.shape[i];
    return same;
  }
  bool floating() const {
    return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

/// `f32[2,16,768] cpu`, the form in which every error message shows a tensor.
std::string to_string(const Tensor& t);

}  // namespace warpformer
