// wgmma over an image of shared memory, as its descriptors say. A file for each operand type.
#pragma once

#include <utility>

#include "conformance/case.h"

namespace warpformer::cuda {
namespace {

/// An operand: byte offset, leading and stride offsets, swizzle's span, base offset.
struct OperandAt {
  int offset, leading, stride, base_offset;
  Swizzle swizzle;
};

// A block a product. Images [block][bytes], A's registers [block][thread][4] (read where A comes in
// registers), the output [block][thread][n / 2] is read and accumulated to. `steps` instructions,
// the start of each operand `step` bytes after the last.
template <class T, int n, bool a_in_registers, Major a_major, Major b_major, class D>
KERNEL(128)
product(const uint8_t* images, const uint32_t* registers, D* out, int bytes, OperandAt a,
        OperandAt b, bool accumulate, int steps, int a_step, int b_step) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const auto base = shared_memory<uint8_t>();
  const auto space = base + static_cast<int>((1024 - base.address() % 1024) % 1024);
  const uint8_t* image = images + block_index() * bytes;
  for (int i = 16 * thread_index(); i < bytes; i += 16 * block_threads())
    space.store16(i, load16(image + i));
  fence_proxy_async();
  sync_block();
  const int64_t thread = block_index() * 128 + thread_index();
  D d[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) d[i] = load(out + thread * (n / 2) + i);
  uint32_t left[4] = {};
  if constexpr (a_in_registers)
    for (int i = 0; i < 4; ++i) left[i] = load(registers + thread * 4 + i);
  const Descriptor from_a =
      make_descriptor(space + a.offset, a.leading, a.stride, a.swizzle, a.base_offset);
  const Descriptor from_b =
      make_descriptor(space + b.offset, b.leading, b.stride, b.swizzle, b.base_offset);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wgmma_fence(d);
    const bool add = accumulate || step > 0;
    if constexpr (a_in_registers) {
      wgmma<T, b_major>(d, left, from_b + step * b_step, add);
    } else {
      wgmma<T, a_major, b_major>(d, from_a + step * a_step, from_b + step * b_step, add);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < n / 2; ++i) store(out + thread * (n / 2) + i, d[i]);
#endif
}

/// Numbers: n, bytes of an image, A (offset, leading, stride, base offset, span), B, accumulate,
/// steps, A's and B's step.
template <class T, int n, bool a_in_registers, Major a_major, Major b_major>
void run_product(const conformance::Call& call) {
  using D = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  auto number = [&](size_t i) { return static_cast<int>(call.number(i)); };
  auto operand = [&](size_t i) {
    return OperandAt{number(i), number(i + 1), number(i + 2), number(i + 3),
                     static_cast<Swizzle>(number(i + 4))};
  };
  const int64_t blocks = call.result_bytes / (128 * (n / 2) * 4);
  LAUNCH((product<T, n, a_in_registers, a_major, b_major, D>), blocks, 128,
         static_cast<size_t>(number(1) + 1024), call.stream, call.input<uint8_t>(0),
         call.input<uint32_t>(1), call.output<D>(), number(1), operand(2), operand(7),
         number(12) != 0, number(13), number(14), number(15));
}

template <class T, bool a_in_registers, Major a_major, Major b_major, int... n>
void run_width(const conformance::Call& call, std::integer_sequence<int, n...>) {
  const bool found =
      ((call.number(0) == n && (run_product<T, n, a_in_registers, a_major, b_major>(call), true)) ||
       ...);
  if (!found) throw std::invalid_argument("no wgmma case of this width");
}

using EveryWidth = std::integer_sequence<int, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104,
                                         112, 120, 128, 136, 144, 152, 160, 168, 176, 184, 192, 200,
                                         208, 216, 224, 232, 240, 248, 256>;
using IntegerWidths = std::integer_sequence<int, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160,
                                            176, 192, 208, 224, 240, 256>;
using SomeWidths = std::integer_sequence<int, 8, 64, 104, 256>;

#define WGMMA_CASES(name, T, widths)                                              \
  CASE(wgmma_##name) { run_width<T, false, Major::k, Major::k>(call, widths{}); } \
  CASE(wgmma_##name##_registers) { run_width<T, true, Major::k, Major::k>(call, widths{}); }
#define WGMMA_MAJOR_CASES(name, T, widths)                                                  \
  CASE(wgmma_##name##_k_mn) { run_width<T, false, Major::k, Major::mn>(call, widths{}); }   \
  CASE(wgmma_##name##_mn_k) { run_width<T, false, Major::mn, Major::k>(call, widths{}); }   \
  CASE(wgmma_##name##_mn_mn) { run_width<T, false, Major::mn, Major::mn>(call, widths{}); } \
  CASE(wgmma_##name##_registers_mn) { run_width<T, true, Major::k, Major::mn>(call, widths{}); }

}  // namespace
}  // namespace warpformer::cuda
