// The list of ISAs, worst to best; each one includes those before it. A new one is a word here, a
// line in CMakeLists.txt, a test in isa.cpp and, where its vectors differ, a section of simd.h.
#pragma once

namespace warpformer::cuda {

/// Where a kernel is launched: a device, and a stream (cudaStream_t) of it.
struct Stream {
  int device;
  void* handle;
};

}  // namespace warpformer::cuda

#if defined(__x86_64__)
#define WF_FOR_EACH_ISA(F, ...)             \
  F(scalar __VA_OPT__(, ) __VA_ARGS__)      \
  F(avx2 __VA_OPT__(, ) __VA_ARGS__)        \
  F(avx512 __VA_OPT__(, ) __VA_ARGS__)      \
  F(avx512_vnni __VA_OPT__(, ) __VA_ARGS__) \
  F(avx512_bf16 __VA_OPT__(, ) __VA_ARGS__)
#else
#define WF_FOR_EACH_ISA(F, ...) F(scalar __VA_OPT__(, ) __VA_ARGS__)
#endif

/// DECLARE_CPU_KERNEL(linear, LinearParams), in op.h: one function per ISA.
#define WF_DECLARE_(isa, name, Params)   \
  namespace isa {                        \
  void name(const Params&, int threads); \
  }
#define DECLARE_CPU_KERNEL(name, Params)     \
  namespace cpu {                            \
  WF_FOR_EACH_ISA(WF_DECLARE_, name, Params) \
  }

/// DECLARE_KERNEL(layer_norm, LayerNormParams), in op.h: the kernels of an op for both devices.
#define DECLARE_KERNEL(name, Params) \
  DECLARE_CPU_KERNEL(name, Params)   \
  namespace cuda {                   \
  void name(const Params&, Stream);  \
  }
