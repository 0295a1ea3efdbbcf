// Element types. Arithmetic is float everywhere: bf16 and f16 only load and store.
// Safe in files of any ISA: no functions, so nothing for the linker to merge.
#pragma once

#include <cstdint>

namespace warpformer {

enum class DType : uint8_t { f32, f16, bf16, i8, u8, i32, i64, boolean, unsupported };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

/// The dtype of float, bf16 or f16.
template <class T>
constexpr DType kDType = DType::f32;
template <>
inline constexpr DType kDType<bf16> = DType::bf16;
template <>
inline constexpr DType kDType<f16> = DType::f16;

}  // namespace warpformer
