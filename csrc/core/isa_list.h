// The list of ISAs, worst to best; each one includes those before it. A new one is a word here, a
// line in CMakeLists.txt, a test in isa.cpp and, where its vectors differ, a section of simd.h.
#pragma once

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

/// DECLARE_CPU_KERNEL(layer_norm, LayerNormParams), in op.h: one function per ISA.
#define WF_DECLARE_(isa, name, Params) \
  namespace isa {                      \
  void name(const Params&);            \
  }
#define DECLARE_CPU_KERNEL(name, Params)     \
  namespace cpu {                            \
  WF_FOR_EACH_ISA(WF_DECLARE_, name, Params) \
  }
