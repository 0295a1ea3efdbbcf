// Twelve independent accumulators hide the latency of every one of these instructions.
#include "core/parallel.h"
#include "core/simd.h"
#include "roofline/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int kAccumulators = 12;
constexpr int64_t kLine = 16;  // floats of a cache line

#define WF_TWELVE(line) \
  line(0) line(1) line(2) line(3) line(4) line(5) line(6) line(7) line(8) line(9) line(10) line(11)

// Registers 0-11 accumulate, 12-14 hold the operand, 15 is in between.
#if defined(__AVX512F__)
#define WF_R(i) "%%zmm" #i
constexpr int kLanes = 16;
#elif defined(__AVX2__)
#define WF_R(i) "%%ymm" #i
constexpr int kLanes = 8;
#else
#define WF_R(i) "%%xmm" #i
constexpr int kLanes = 4;
#endif

#if defined(__AVX2__)
#define WF_DONE "vzeroupper\n"
#define WF_FILL(i) "vbroadcastss %1, " WF_R(i) "\n"
#define WF_FMA(i) "vfmadd231ps " WF_R(12) ", " WF_R(13) ", " WF_R(i) "\n"
#else
#define WF_DONE ""
#define WF_FILL(i) "movss %1, " WF_R(i) "\nshufps $0, " WF_R(i) ", " WF_R(i) "\n"
#define WF_FMA(i) \
  "movaps " WF_R(12) ", " WF_R(15) "\n"   \
  "mulps " WF_R(13) ", " WF_R(15) "\n"    \
  "addps " WF_R(15) ", " WF_R(i) "\n"
#endif
#define WF_BF16(i) "vdpbf16ps " WF_R(12) ", " WF_R(13) ", " WF_R(i) "\n"
#define WF_VNNI(i) "vpdpbusd " WF_R(12) ", " WF_R(13) ", " WF_R(i) "\n"
#define WF_MADD(i) \
  "vpmaddubsw " WF_R(12) ", " WF_R(13) ", " WF_R(15) "\n"  \
  "vpmaddwd " WF_R(14) ", " WF_R(15) ", " WF_R(15) "\n"    \
  "vpaddd " WF_R(15) ", " WF_R(i) ", " WF_R(i) "\n"

// About 0.75 as f32, 0.75 twice as bf16, small numbers as int8: sums stay finite, nothing is 0.
constexpr uint32_t kOperand = 0x3f403f40;

#define WF_REPEAT(line)                                                                          \
  asm volatile(WF_TWELVE(WF_FILL) WF_FILL(12) WF_FILL(13)                                        \
                   WF_FILL(14) "1:\n" WF_TWELVE(line) "dec %0\njnz 1b\n" WF_DONE                 \
               : "+r"(rounds)                                                                    \
               : "m"(kOperand)                                                                   \
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                 "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc")

/// Each does `rounds` rounds (at least one) and returns the operations of one.
double run_f32(int64_t rounds) {
#if defined(__x86_64__)
  WF_REPEAT(WF_FMA);
  return 2.0 * kAccumulators * kLanes;
#else
  (void)rounds;
  return 0;
#endif
}

double run_bf16(int64_t rounds) {
#if defined(__AVX512BF16__)
  WF_REPEAT(WF_BF16);
  return 2.0 * kAccumulators * 32;
#else
  (void)rounds;
  return 0;
#endif
}

double run_int8(int64_t rounds) {
#if defined(__AVX512VNNI__)
  WF_REPEAT(WF_VNNI);
  return 2.0 * kAccumulators * 64;
#elif defined(__AVX2__)
  WF_REPEAT(WF_MADD);
  return 2.0 * kAccumulators * kLanes * 4;
#else
  (void)rounds;
  return 0;
#endif
}

double run_read(const float* p, int64_t n, int64_t rounds) {
  Vec total[8];
  for (Vec& v : total) v = set(0.0f);
  const int64_t step = 8 * Vec::kWidth;
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t i = 0; i + step <= n; i += step)
      for (int j = 0; j < 8; ++j) total[j] = max(total[j], load(p + i + j * Vec::kWidth));
  volatile float used = 0;
  for (const Vec& v : total) used = used + max_lane(v);
  return static_cast<double>(n) * sizeof(float);
}

double run_copy(const float* from, float* to, int64_t n, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round)
    for_lanes(n, [&](int64_t i, auto k) { store(to + i, load(from + i, k), k); });
  return 2.0 * static_cast<double>(n) * sizeof(float);
}

}  // namespace

void roofline(const RooflineParams& p, int threads) {
  const int64_t floats = p.bytes / static_cast<int64_t>(sizeof(float));
  double per_round = 0;
  parallel(threads, [&](int t) {
    // The arrays are cut among the threads; of the peaks every thread runs its own.
    const int64_t n = (p.limit == Limit::copy ? floats / 2 : floats) / threads;
    float* mine = reinterpret_cast<float*>(p.memory) + t * n;
    double work = 0;
    switch (p.limit) {
      case Limit::peak_f32:
        work = run_f32(p.rounds);
        break;
      case Limit::peak_bf16:
        work = run_bf16(p.rounds);
        break;
      case Limit::peak_int8:
        work = run_int8(p.rounds);
        break;
      case Limit::read:
        work = run_read(mine, n, p.rounds);
        break;
      case Limit::copy:  // a line over: no page becomes like another, as the system merges those
        work = run_copy(mine + kLine, mine + floats / 2, n - kLine, p.rounds);
        break;
    }
    if (t == 0) per_round = work;
  });
  *p.work = per_round * static_cast<double>(p.rounds) * threads;
}

}  // namespace warpformer::cpu::WF_ISA
