// From a run-time dtype to a type, for cpu.cpp files.
#pragma once

#include "core/types.h"

namespace warpformer::cpu::WF_ISA {

/// by_float(dtype, [&](auto t) { using T = decltype(t); ... }). op.cpp has CHECKed that it is one.
template <class F>
void by_float(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}

}  // namespace warpformer::cpu::WF_ISA
