// Fibers: a stack each, and a switch that saves what the x86-64 calling convention asks a callee to
// save. swapcontext would cost two system calls.
#pragma once

#include <cstddef>

namespace warpformer::emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Next time it is switched to, the fiber calls `entry` from the top of `stack`.
  void start(std::byte* stack_end, void (*entry)());
  /// Leaves the running fiber, `*this`, and runs `other` until something switches back.
  void switch_to(Fiber& other);

 private:
  void* stack_pointer_ = nullptr;
};

/// Stacks with a guard page below each: an overflow is a crash, not a silent overwrite.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks();
  void reserve(int count);
  /// The end of stack `i`, where it begins to grow down.
  std::byte* end(int i) const;

 private:
  void release();
  std::byte* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace warpformer::emulator
