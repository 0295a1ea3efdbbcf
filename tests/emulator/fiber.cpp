#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#error "the emulator switches contexts on x86-64 only"
#endif

// void switch_stacks(void** save, void* load)
asm(R"(
  .text
  .p2align 4
  .type warpformer_switch_stacks, @function
warpformer_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size warpformer_switch_stacks, . - warpformer_switch_stacks
)");
extern "C" void switch_stacks(void** save, void* load) asm("warpformer_switch_stacks");

namespace warpformer::emulator {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kStride = kGuard + kStack;
// Stacks an exact power of two apart would compete for the same cache sets.
constexpr size_t kStagger = 320;

}  // namespace

void Fiber::start(std::byte* stack_end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_end);
  *--top = nullptr;  // entry's return address: it has none, and unwinding stops here
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& other) { switch_stacks(&stack_pointer_, other.stack_pointer_); }

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (memory_) munmap(memory_, count_ * kStride);
  memory_ = nullptr;
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  release();
  void* memory = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i)
    if (mprotect(memory_ + i * kStride, kGuard, PROT_NONE)) throw std::bad_alloc();
}

std::byte* Stacks::end(int i) const {
  return memory_ + (i + 1) * kStride - kStagger * (i % 12) - 16;
}

}  // namespace warpformer::emulator
