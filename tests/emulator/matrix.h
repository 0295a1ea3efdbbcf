// Host bodies of matrix.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/types.h"
#include "emulator/emulator.h"

namespace warpformer::cuda {
struct tf32;
}

namespace warpformer::emulator {

enum class MatrixType : uint8_t { bf16, f16, tf32, s8 };
constexpr int element_bytes(MatrixType type) {
  return type == MatrixType::tf32 ? 4 : type == MatrixType::s8 ? 1 : 2;
}

template <class T>
constexpr MatrixType matrix_type() {
  return std::is_same_v<T, bf16>         ? MatrixType::bf16
         : std::is_same_v<T, f16>        ? MatrixType::f16
         : std::is_same_v<T, cuda::tf32> ? MatrixType::tf32
                                         : MatrixType::s8;
}

void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t row, Where where);
void stmatrix(uint32_t row, const uint32_t* registers, int count, bool transposed, Where where);
uint32_t movmatrix_transposed(uint32_t matrix, Where where);
/// d is float[4], of s8 int32_t[4].
void mma(MatrixType type, void* d, const uint32_t* a, const uint32_t* b, Where where);

}  // namespace warpformer::emulator
