// Matrix fragments of a warp: 8 x 8 blocks between shared memory and registers, or transposed among
// registers, and mma.sync.
// All 32 lanes call each function together. Who holds which element: tests/emulator/layouts.h.
#pragma once

#include <type_traits>

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"

namespace warpformer::cuda {

/// Reads one 8 x 8 matrix of 2-byte elements into each of the 1, 2 or 4 registers of the fragment.
/// Lane 8m + r passes the address of row r of matrix m: 16 bytes, a multiple of 16. The addresses
/// of the lanes beyond 8 a matrix do not matter.
template <class T, int count>
DEVICE void ldmatrix(uint32_t (&fragment)[count], Shared<T> row, WHERE) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix reads 1, 2 or 4 matrices");
#ifdef WARPFORMER_EMULATED
  emulator::ldmatrix(fragment, count, false, row.address(), where);
#else
  if constexpr (count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(row.address())
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(row.address())
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row.address())
                 : "memory");
  }
#endif
}

/// The same, each matrix transposed.
template <class T, int count>
DEVICE void ldmatrix_transposed(uint32_t (&fragment)[count], Shared<T> row, WHERE) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix reads 1, 2 or 4 matrices");
#ifdef WARPFORMER_EMULATED
  emulator::ldmatrix(fragment, count, true, row.address(), where);
#else
  if constexpr (count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(row.address())
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(row.address())
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row.address())
                 : "memory");
  }
#endif
}

/// Four matrices into two fragments of two registers: the B operands of two neighbouring mmas.
template <class T>
DEVICE void ldmatrix(uint32_t (&fragments)[2][2], Shared<T> row, WHERE) {
  uint32_t r[4];
  ldmatrix(r, row, where);
  fragments[0][0] = r[0], fragments[0][1] = r[1], fragments[1][0] = r[2], fragments[1][1] = r[3];
}
template <class T>
DEVICE void ldmatrix_transposed(uint32_t (&fragments)[2][2], Shared<T> row, WHERE) {
  uint32_t r[4];
  ldmatrix_transposed(r, row, where);
  fragments[0][0] = r[0], fragments[0][1] = r[1], fragments[1][0] = r[2], fragments[1][1] = r[3];
}

/// An 8 x 8 matrix of 2-byte elements, one register a lane as ldmatrix gives it, transposed.
DEVICE uint32_t movmatrix_transposed(uint32_t matrix, WHERE) {
#ifdef WARPFORMER_EMULATED
  return emulator::movmatrix_transposed(matrix, where);
#else
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// Writes matrices as ldmatrix reads them; sm_90 and up.
template <class T, int count>
DEVICE void stmatrix(Shared<T> row, const uint32_t (&fragment)[count], WHERE) {
  static_assert(count == 1 || count == 2 || count == 4, "stmatrix writes 1, 2 or 4 matrices");
#ifdef WARPFORMER_EMULATED
  emulator::stmatrix(row.address(), fragment, count, false, where);
#else
  if constexpr (count == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row.address()),
                 "r"(fragment[0])
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row.address()),
                 "r"(fragment[0]), "r"(fragment[1])
                 : "memory");
  } else {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address()),
        "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
        : "memory");
  }
#endif
}

template <class T, int count>
DEVICE void stmatrix_transposed(Shared<T> row, const uint32_t (&fragment)[count], WHERE) {
  static_assert(count == 1 || count == 2 || count == 4, "stmatrix writes 1, 2 or 4 matrices");
#ifdef WARPFORMER_EMULATED
  emulator::stmatrix(row.address(), fragment, count, true, where);
#else
  if constexpr (count == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row.address()),
                 "r"(fragment[0])
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row.address()),
        "r"(fragment[0]), "r"(fragment[1])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     row.address()),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
  }
#endif
}
#endif

/// d += a b: 16 x 8 += (16 x 16) (16 x 8), T bf16 or f16, products exact, sums in float.
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WHERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "operands are bf16 or f16");
#ifdef WARPFORMER_EMULATED
  emulator::mma(emulator::matrix_type<T>(), d, a, b, where);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

/// d += a b: 16 x 8 += (16 x 8) (8 x 8) in tf32: floats of which the low 13 bits are not read.
DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::mma(emulator::MatrixType::tf32, d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// d += a b: 16 x 8 += (16 x 32) (32 x 8), signed bytes into int32, which wraps around.
DEVICE void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::mma(emulator::MatrixType::s8, d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace warpformer::cuda
