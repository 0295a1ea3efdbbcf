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

}  // namespace warpformer::cpu::WF_ISA
