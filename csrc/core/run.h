// The last hop of every op.cpp: from the device of a tensor to the kernel. `executor` is what
// Python passes: the number of threads of a CPU call, the stream (cudaStream_t) of a CUDA one.
#pragma once

#include "core/check.h"
#include "core/isa.h"

namespace warpformer {

inline cuda::Stream stream_of(const Tensor& x, int64_t executor) {
  return {x.device.index, reinterpret_cast<void*>(executor)};
}

/// Whether op.cpp may read values beside x, indices to check: a GPU's memory it cannot, and the
/// emulated build does as a GPU does.
inline bool runs_on_cpu([[maybe_unused]] const Tensor& x) {
#ifdef WARPFORMER_EMULATED
  return false;
#else
  return x.device.type == DeviceType::cpu;
#endif
}

}  // namespace warpformer

/// RUN_CPU_KERNEL(linear, params, x, executor), for an op that has only a CPU kernel.
#if defined(WARPFORMER_EMULATED)  // has no CPU kernels
#define RUN_CPU_KERNEL(name, params, x, executor)            \
  do {                                                       \
    (void)(params), (void)(executor);                        \
    ::warpformer::fail(__func__, "a CUDA kernel", "x", (x)); \
  } while (0)
#else
#define RUN_CPU_KERNEL(name, params, x, executor)         \
  do {                                                    \
    CHECK_CPU(x);                                         \
    CHECK(executor > 0, executor);                        \
    CPU_KERNEL(name)(params, static_cast<int>(executor)); \
  } while (0)
#endif

/// RUN_KERNEL(softmax, params, x, executor): the kernel of x's device. In the tests' emulated build
/// the CUDA kernel runs on CPU tensors.
#if defined(WARPFORMER_EMULATED)
#define RUN_KERNEL(name, params, x, executor) cuda::name(params, stream_of(x, executor))
#elif defined(WARPFORMER_CUDA)
#define RUN_KERNEL(name, params, x, executor)     \
  do {                                            \
    if ((x).device.type == DeviceType::cuda) {    \
      cuda::name(params, stream_of(x, executor)); \
    } else {                                      \
      RUN_CPU_KERNEL(name, params, x, executor);  \
    }                                             \
  } while (0)
#else
#define RUN_KERNEL RUN_CPU_KERNEL
#endif
