// A pipelined product as sm_90 kernels write it, with bugs that can be switched on; the lines
// marked "caught: <name>" are those the emulator names.
//
//   D = A B^T in tf32, A and B 64 x 128 floats: one block, two stages of 64 x 32 boxes of A and B.
//   warp 4     waits on empty[stage], has the copy engine fill the stage, which full[stage] counts
//   warps 0-3  wait on full[stage], multiply the stage (4 wgmmas), wait for that, arrive on
//              empty[stage]
#include "core/cuda/bulk.cuh"
#include "core/cuda/ptx.cuh"
#include "core/cuda/wgmma.cuh"
#include "emulator/self_test.h"

namespace warpformer::cuda {
namespace {

constexpr int kM = 64, kN = 64, kDepth = 128, kSlice = 32, kStages = 2;
constexpr int kBoxBytes = 4 * kM * kSlice, kThreads = 160, kConsumers = 128;

// clang-format off
#define WGMMA_BUGS(X)                                                                    \
  X(full_not_waited) X(empty_not_waited) X(expects_half) X(empty_expects_two)            \
  X(accumulator_read_early) X(accumulator_written_early) X(released_early) X(no_fence)   \
  X(no_commit) X(no_wait) X(waits_too_little) X(stride_of_zero) X(divergent_descriptor)  \
  X(divergent_accumulate) X(misplaced_start) X(wrong_advance) X(wrong_swizzle) X(other_width)
// clang-format on

#define WGMMA_NAME(bug) bug,
enum class Bug { WGMMA_BUGS(WGMMA_NAME) };

/// Shared memory: barriers, then per stage A and B, at multiples of 1024.
struct Stages {
  DEVICE Barrier full(int i) const { return Barrier(shared_memory<uint64_t>(8 * i)); }
  DEVICE Barrier empty(int i) const { return Barrier(shared_memory<uint64_t>(16 + 8 * i)); }
  DEVICE Shared<float> a(int i) const {
    const auto base = shared_memory<float>(32);
    return base +
           static_cast<int>((1024 - base.address() % 1024) % 1024 / 4 + 2 * i * kBoxBytes / 4);
  }
  DEVICE Shared<float> b(int i) const { return a(i) + kBoxBytes / 4; }
};

template <Bug bug>
DEVICE void produce(const TensorMap& a, const TensorMap& b, bool broken) {
  const Stages stages;
  if (!elect()) return;
  for (int i = 0; i < kDepth / kSlice; ++i) {
    const int s = i % kStages, round = i / kStages;
    if (!(broken && bug == Bug::empty_not_waited))
      stages.empty(s).wait((round & 1) ^ 1);  // caught: empty_expects_two
    const int bytes = broken && bug == Bug::expects_half ? kBoxBytes : 2 * kBoxBytes;
    stages.full(s).arrive_expect(bytes);                           // caught: empty_not_waited
    tensor_load(stages.a(s), a, {i * kSlice, 0}, stages.full(s));  // caught: expects_half
    tensor_load(stages.b(s), b, {i * kSlice, 0}, stages.full(s));  // caught: expects_half
  }
}

template <Bug bug>
DEVICE void consume(float* out, bool broken) {
  const Stages stages;
  float d[kN / 2] = {};
  float early = 0;
  for (int i = 0; i < kDepth / kSlice; ++i) {
    const int s = i % kStages;
    if (!(broken && bug == Bug::full_not_waited)) stages.full(s).wait(i / kStages & 1);
    const int stride = broken && bug == Bug::stride_of_zero ? 0 : 1024;
    const Swizzle swizzle =
        broken && bug == Bug::wrong_swizzle ? Swizzle::bytes64 : Swizzle::bytes128;
    int start = 0;
    if (broken && bug == Bug::divergent_descriptor && thread_index() == 77) start = 8;
    if (broken && bug == Bug::misplaced_start) start = 32;
    const Descriptor a = make_descriptor(stages.a(s) + start, 16, stride, swizzle);
    const Descriptor b = make_descriptor(stages.b(s), 16, stride, swizzle);
    const int step = broken && bug == Bug::wrong_advance ? 16 : 32;
    if (!(broken && bug == Bug::no_fence)) wgmma_fence(d);
    // clang-format off
    for (int k = 0; k < 4; ++k) {
      bool accumulate = i > 0 || k > 0;
      if (broken && bug == Bug::divergent_accumulate && warp_index() == 2) accumulate = true;
      wgmma<tf32>(d, a + k * step, b + k * step, accumulate);  // caught: full_not_waited released_early no_fence no_wait stride_of_zero divergent_descriptor divergent_accumulate misplaced_start expects_half accumulator_written_early waits_too_little empty_not_waited
    }
    // clang-format on
    if (broken && bug == Bug::other_width)
      wgmma<tf32>(reinterpret_cast<float (&)[kN / 4]>(d), a, b, true);  // caught: other_width
    if (!(broken && bug == Bug::no_commit)) wgmma_commit();
    if (broken && bug == Bug::accumulator_read_early)
      early = from_float<float>(d[5] * 2.0f);  // caught: accumulator_read_early
    if (broken && bug == Bug::accumulator_written_early) d[7] = 1.0f;
    if (broken && bug == Bug::released_early && thread_index() == 0) stages.empty(s).arrive();
    if (broken && bug == Bug::waits_too_little) {
      wgmma_wait<1>(d);
    } else if (!(broken && bug == Bug::no_wait)) {
      wgmma_wait<0>(d);  // caught: no_commit
    }
    if (!(broken && bug == Bug::released_early) && thread_index() == 0) stages.empty(s).arrive();
  }
  if (broken && bug == Bug::waits_too_little) wgmma_wait<0>(d);
  const int row = 16 * warp_index() + lane_index() / 4, column = 2 * (lane_index() % 4);
  for (int i = 0; i < kN / 2; ++i)
    store(out + (row + i / 2 % 2 * 8) * kN + column + i / 4 * 8 + i % 2, d[i] + 0 * early);
}

template <Bug bug>
KERNEL(160, 1)
product(const GRID_CONSTANT TensorMap a, const GRID_CONSTANT TensorMap b, float* out, bool broken) {
  const Stages stages;
  if (thread_index() == 0) {
    for (int i = 0; i < kStages; ++i) {
      stages.full(i).init(1);
      stages.empty(i).init(broken && bug == Bug::empty_expects_two ? 2 : 1);
    }
    fence_barrier_init();
  }
  sync_block();
  if (warp_index() == kConsumers / 32) {
    produce<bug>(a, b, broken);
  } else {
    increase_registers<160>();
    consume<bug>(out, broken);
  }
}

/// Operands that threads write themselves, K-major without a swizzle: 64 x 8 floats each, D to out.
/// Broken: no fence between these writes and the reads of wgmma.
KERNEL(128) operands_not_fenced(const float* in, float* out, bool broken) {
  const auto a = shared_memory<float>(), b = a + 512;
  for (int i = thread_index(); i < 512; i += block_threads()) {
    const int row = i / 8, k = i % 8;
    const int at = k / 4 * 256 + row * 4 + k % 4;  // 16-byte chunks: rows one after the other
    a.store(at, load(in + i));
    b.store(at, load(in + 512 + i));
  }
  if (!broken) fence_proxy_async();
  sync_block();
  float d[32] = {};
  wgmma_fence(d);
  const Descriptor from_a = make_descriptor(a, 1024, 128, Swizzle::none);
  const Descriptor from_b = make_descriptor(b, 1024, 128, Swizzle::none);
  wgmma<tf32>(d, from_a, from_b, false);  // caught: operands_not_fenced
  wgmma_commit();
  wgmma_wait<0>(d);
  const int row = 16 * warp_index() + lane_index() / 4, column = 2 * (lane_index() % 4);
  for (int i = 0; i < 32; ++i)
    store(out + (row + i / 2 % 2 * 8) * 64 + column + i / 4 * 8 + i % 2, d[i]);
}

/// The same, but one thread overwrites an operand before the wait.
KERNEL(128) operand_overwritten(const float* in, float* out, bool broken) {
  const auto a = shared_memory<float>(), b = a + 512;
  for (int i = thread_index(); i < 512; i += block_threads()) {
    const int row = i / 8, k = i % 8;
    const int at = k / 4 * 256 + row * 4 + k % 4;
    a.store(at, load(in + i));
    b.store(at, load(in + 512 + i));
  }
  fence_proxy_async();
  sync_block();
  float d[32] = {};
  wgmma_fence(d);
  const Descriptor from_a = make_descriptor(a, 1024, 128, Swizzle::none);
  const Descriptor from_b = make_descriptor(b, 1024, 128, Swizzle::none);
  wgmma<tf32>(d, from_a, from_b, false);  // caught: operand_overwritten
  wgmma_commit();
  if (broken && thread_index() == 9) b.store(100, 0.0f);  // caught: operand_overwritten
  wgmma_wait<0>(d);
  const int row = 16 * warp_index() + lane_index() / 4, column = 2 * (lane_index() % 4);
  for (int i = 0; i < 32; ++i)
    store(out + (row + i / 2 % 2 * 8) * 64 + column + i / 4 * 8 + i % 2, d[i]);
}

}  // namespace
}  // namespace warpformer::cuda

namespace warpformer::emulator {

using namespace warpformer::cuda;

template <Bug bug>
void bind_product(py::module_& m, const char* name) {
  m.def(
      name,
      [name](Tensor in, Tensor out, bool broken) {
        auto map = [](const float* data) {
          return make_tensor_map(data, {kDepth, kM}, {1, kDepth}, {kSlice, kM}, Swizzle::bytes128);
        };
        const float* x = in.ptr<float>();
        cuda::launch(name, product<bug>, 1, kThreads, 2048 + 2 * kStages * kBoxBytes, Stream{},
                     map(x), map(x + kM * kDepth), out.ptr<float>(), broken);
      },
      nogil());
}

void bind_wgmma(py::module_& m) {
#define WGMMA_BIND(bug) bind_product<Bug::bug>(m, #bug);
  WGMMA_BUGS(WGMMA_BIND)
  PLANT(operands_not_fenced, 1, 128, 4096);
  PLANT(operand_overwritten, 1, 128, 4096);
}

}  // namespace warpformer::emulator
