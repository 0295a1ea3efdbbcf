// From a run-time dtype to a type, once per call.
#pragma once

#include "core/types.h"

namespace warpformer {

/// by_float(dtype, [&](auto t) { using T = decltype(t); ... }). op.cpp has CHECKed that it is one.
template <class F>
void by_float(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}

}  // namespace warpformer
