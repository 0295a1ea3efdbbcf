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

}  // namespace warpformer
