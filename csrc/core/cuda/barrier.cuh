// mbarriers: barriers in shared memory that count arrivals and the bytes of asynchronous copies;
// and the fences between ordinary accesses and those of copy engines and wgmma (the async proxy).
#pragma once

#include "core/cuda/memory.cuh"

namespace warpformer::cuda {

/// One mbarrier: 8 bytes of shared memory. A phase completes when all arrivals have come and the
/// bytes expected have landed; then the next one begins, with the same count. Phases alternate 0,
/// 1, 0, ...
class Barrier {
 public:
  static constexpr int bytes = 8;

  DEVICE explicit Barrier(Shared<uint64_t> word) : address_(word.address()) {}
  DEVICE uint32_t address() const { return address_; }

  /// By one thread; then fence_barrier_init() and a sync_block() before anybody else uses it.
  DEVICE void init(int count, WHERE) const {
#ifdef WARPFORMER_EMULATED
    emulator::barrier_init(address_, static_cast<uint32_t>(count), where);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_), "r"(count) : "memory");
#endif
  }
  DEVICE void arrive(WHERE) const {
#ifdef WARPFORMER_EMULATED
    emulator::barrier_arrive(address_, "Barrier::arrive", where);
#else
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(address_)
        : "memory");
#endif
  }
  /// The current phase also waits for `count` more bytes (sm_90).
  DEVICE void expect(int count, WHERE) const {
#ifdef WARPFORMER_EMULATED
    emulator::barrier_expect(address_, static_cast<uint32_t>(count), "Barrier::expect", where);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address_),
                 "r"(count)
                 : "memory");
#else
    __trap();
#endif
  }
  /// expect(count), then arrive() (sm_90).
  DEVICE void arrive_expect(int count, WHERE) const {
#ifdef WARPFORMER_EMULATED
    emulator::barrier_expect(address_, static_cast<uint32_t>(count), "Barrier::arrive_expect",
                             where);
    emulator::barrier_arrive(address_, "Barrier::arrive_expect", where);
#elif __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}\n" ::
            "r"(address_),
        "r"(count)
        : "memory");
#else
    __trap();
#endif
  }
  /// Arrives, once, when every copy_async this thread has issued so far has landed.
  DEVICE void arrive_after_copies(WHERE) const {
#ifdef WARPFORMER_EMULATED
    emulator::barrier_arrive_after_copies(address_, where);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address_) : "memory");
#endif
  }
  /// Whether the phase of parity `phase` is complete; may wait a while for it.
  DEVICE bool try_wait(int phase, WHERE) const {
#ifdef WARPFORMER_EMULATED
    return emulator::barrier_try_wait(address_, static_cast<uint32_t>(phase), where);
#else
    uint32_t complete;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(complete)
        : "r"(address_), "r"(phase)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(complete)
        : "r"(address_), "r"(phase)
        : "memory");
#endif
    return complete;
#endif
  }
  /// Waits for the phase of parity `phase`; what was done before its arrivals is visible then.
  DEVICE void wait(int phase, WHERE) const {
#ifdef WARPFORMER_EMULATED
    emulator::barrier_wait(address_, static_cast<uint32_t>(phase), where);
#else
    while (!try_wait(phase, where)) {
    }
#endif
  }

 private:
  uint32_t address_;
};

/// Makes this thread's Barrier::init visible to copy engines (sm_90; nothing is needed before).
DEVICE void fence_barrier_init(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::fence_barrier_init(where);
#elif __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
/// Orders the ordinary shared memory accesses this thread has made or learnt of by a barrier before
/// the accesses of bulk copies and wgmma that follow (sm_90).
DEVICE void fence_proxy_async(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::fence_proxy_async(where);
#elif __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace warpformer::cuda
