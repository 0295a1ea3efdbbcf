// Loops on torch's own OpenMP threads. Included by cpu.cpp files only: the code lives in the
// namespace of its ISA, so that the linker never merges two ISAs' copies.
#pragma once

#include <omp.h>

#include <cstdint>

namespace warpformer::cpu::WF_ISA {

/// Calls f(thread) on `threads` threads. One thread enters no parallel region: in a forked process
/// (a DataLoader worker) libgomp would wait for threads that did not survive the fork.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    f(0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    // libgomp may give fewer threads than asked for (OMP_THREAD_LIMIT): those share the work.
    const int given = omp_get_num_threads();
    for (int t = omp_get_thread_num(); t < threads; t += given) f(t);
  }
}

/// Calls f(thread, begin, end) on equal runs of [0, n), one per thread. A thread is woken for every
/// `grain` items only.
template <class F>
void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
  const int64_t worth = (n + grain - 1) / grain;
  const int used = static_cast<int>(worth < threads ? (worth > 1 ? worth : 1) : threads);
  parallel(used, [&](int t) { f(t, n * t / used, n * (t + 1) / used); });
}

/// Hands out units [0, n) of work. Every thread has a run of its own, the same in every call of so
/// many units, so that what it reads and writes there stays in its cache from one op to the next;
/// at the end of it, it takes what others have left.
class Units {
 public:
  /// Floats of memory.
  static int64_t size(int threads) { return kLine * threads; }

  Units(int64_t n, int threads, float* memory) : n_(n), threads_(threads), memory_(memory) {
    for (int t = 0; t < threads; ++t) *next_of(t) = begin_of(t);
  }

  /// A unit for a thread; -1 if there is none left.
  int64_t take(int thread) const {
    for (int i = 0, t = thread; i < threads_; ++i, t = t + 1 < threads_ ? t + 1 : 0) {
      if (__atomic_load_n(next_of(t), __ATOMIC_RELAXED) >= begin_of(t + 1)) continue;
      const int64_t unit = __atomic_fetch_add(next_of(t), 1, __ATOMIC_RELAXED);
      if (unit < begin_of(t + 1)) return unit;
    }
    return -1;
  }

 private:
  static constexpr int64_t kLine = 16;  // of the cache, in floats: one for each thread

  int64_t begin_of(int64_t t) const { return n_ * t / threads_; }
  int64_t* next_of(int64_t t) const { return reinterpret_cast<int64_t*>(memory_ + t * kLine); }

  int64_t n_;
  int threads_;
  float* memory_;
};

}  // namespace warpformer::cpu::WF_ISA
