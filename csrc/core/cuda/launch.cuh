// Launching a kernel: the one place that knows how. Never synchronizes; fine in CUDA graph capture.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/cuda/thread.cuh"
#include "core/isa_list.h"

namespace warpformer::cuda {

/// Blocks: x alone, or {x, y}.
struct Grid {
  int64_t x, y;
  Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
};

/// LAUNCH(kernel, grid, threads, shared_bytes, stream, arguments...): arguments go by value,
/// converted to the kernel's parameters. Template arguments with a comma need parentheses:
/// LAUNCH((k<A, B>), ...). An empty grid launches nothing; failure throws std::runtime_error.
#define LAUNCH(kernel, ...) ::warpformer::cuda::launch(#kernel, kernel, __VA_ARGS__)

#ifdef WARPFORMER_EMULATED

inline int multiprocessors(int) { return emulator::resident_blocks(); }
inline int compute_capability(int) { return emulator::compute_capability(); }
inline int shared_limit(int) { return 227 << 10; }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t shared_bytes, Stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (grid.x == 0 || grid.y == 0) return;
  struct Body {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> parameters;
  };
  const Body body{kernel, {std::forward<Arguments>(arguments)...}};
  emulator::launch(
      {name, {grid.x, grid.y}, threads, shared_bytes},
      [](const void* p) {
        const Body& b = *static_cast<const Body*>(p);
        std::apply(b.kernel, b.parameters);
      },
      &body);
}

#else

constexpr size_t kDefaultSharedLimit = 48 * 1024;

/// Makes `device` current and, at its end, the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess)
    throw std::runtime_error("CUDA device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error));
  return value;
}
/// Of a device, for grids that stay on it.
inline int multiprocessors(int device) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device);
}
/// 80, 90: major and minor.
inline int compute_capability(int device) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, device);
}
/// Bytes of shared memory that a block can have.
inline int shared_limit(int device) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

/// What the error alone does not say: which architectures and driver versions are at odds.
inline std::string explain(cudaError_t error, int device) {
  auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver ? "; the driver serves CUDA " + version(driver) + ", this build needs CUDA " +
                        version(CUDART_VERSION)
                  : "; no driver is installed";
  }
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return "; the GPU is sm_" + std::to_string(major) + std::to_string(minor) +
#ifdef WARPFORMER_CUDA_ARCHITECTURES
           ", this build has code for " WARPFORMER_CUDA_ARCHITECTURES;
#else
           "";
#endif
  }
  return "";
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t shared_bytes, Stream stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (grid.x == 0 || grid.y == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  const DeviceGuard guard(stream.device);
  cudaError_t error = guard.error;
  if (error == cudaSuccess && shared_bytes > kDefaultSharedLimit)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    std::tuple<std::remove_cv_t<Parameters>...> values{std::forward<Arguments>(arguments)...};
    error = std::apply(
        [&](auto&... value) {
          void* pointers[] = {&value..., nullptr};
          return cudaLaunchKernel(
              function, dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)),
              dim3(static_cast<unsigned>(threads)), pointers, shared_bytes,
              static_cast<cudaStream_t>(stream.handle));
        },
        values);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not see it again
  throw std::runtime_error(
      std::string("CUDA kernel ") + name + " on device " + std::to_string(stream.device) +
      ", grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + ", " +
      std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
      " bytes of shared memory: " + cudaGetErrorString(error) + explain(error, stream.device));
}

#endif

}  // namespace warpformer::cuda
