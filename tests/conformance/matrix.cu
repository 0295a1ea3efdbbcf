// ldmatrix and stmatrix over a piece of shared memory, mma over registers.
#include "conformance/case.h"

namespace warpformer::cuda {
namespace {

// A warp reads `count` matrices: lane i its row at in[1][i]. Shared memory is in[0], 4 KB; the
// output is the registers, [register][lane].
constexpr int kSpace = 4096;

DEVICE void fill(Shared<uint8_t> space, const uint8_t* from, int bytes) {
  for (int i = 16 * thread_index(); i < bytes; i += 16 * block_threads())
    space.store16(i, load16(from + i));
}

template <int count, bool transposed>
KERNEL(32)
load_matrices(const uint8_t* in, const int32_t* rows, uint32_t* out) {
  const auto space = shared_memory<uint8_t>();
  fill(space, in, kSpace);
  sync_block();
  uint32_t fragment[count];
  if constexpr (transposed) {
    ldmatrix_transposed(fragment, space + load(rows + lane_index()));
  } else {
    ldmatrix(fragment, space + load(rows + lane_index()));
  }
  for (int i = 0; i < count; ++i) store(out + 32 * i + lane_index(), fragment[i]);
}
template <int count, bool transposed>
void run_load(const conformance::Call& call) {
  LAUNCH((load_matrices<count, transposed>), 1, 32, kSpace, call.stream, call.input<uint8_t>(0),
         call.input<int32_t>(1), call.output<uint32_t>());
}
CASE(ldmatrix_1) { run_load<1, false>(call); }
CASE(ldmatrix_2) { run_load<2, false>(call); }
CASE(ldmatrix_4) { run_load<4, false>(call); }
CASE(ldmatrix_transposed_1) { run_load<1, true>(call); }
CASE(ldmatrix_transposed_2) { run_load<2, true>(call); }
CASE(ldmatrix_transposed_4) { run_load<4, true>(call); }

// The pair of fragments that one ldmatrix fills: the same registers.
template <bool transposed>
KERNEL(32)
load_fragments(const uint8_t* in, const int32_t* rows, uint32_t* out) {
  const auto space = shared_memory<uint8_t>();
  fill(space, in, kSpace);
  sync_block();
  uint32_t fragments[2][2];
  if constexpr (transposed) {
    ldmatrix_transposed(fragments, space + load(rows + lane_index()));
  } else {
    ldmatrix(fragments, space + load(rows + lane_index()));
  }
  for (int i = 0; i < 4; ++i) store(out + 32 * i + lane_index(), fragments[i / 2][i % 2]);
}
CASE(ldmatrix_pair) {
  LAUNCH(load_fragments<false>, 1, 32, kSpace, call.stream, call.input<uint8_t>(0),
         call.input<int32_t>(1), call.output<uint32_t>());
}
CASE(ldmatrix_transposed_pair) {
  LAUNCH(load_fragments<true>, 1, 32, kSpace, call.stream, call.input<uint8_t>(0),
         call.input<int32_t>(1), call.output<uint32_t>());
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Writes the registers in[0], [register][lane], into zeroed shared memory: the output.
template <int count, bool transposed>
DEVICE void store_matrices(const uint32_t* in, const int32_t* rows, uint8_t* out) {
  const auto space = shared_memory<uint8_t>();
  fill(space, out, kSpace);
  sync_block();
  uint32_t fragment[count];
  for (int i = 0; i < count; ++i) fragment[i] = load(in + 32 * i + lane_index());
  if constexpr (transposed) {
    stmatrix_transposed(space + load(rows + lane_index()), fragment);
  } else {
    stmatrix(space + load(rows + lane_index()), fragment);
  }
  sync_block();
  for (int i = 16 * thread_index(); i < kSpace; i += 16 * block_threads())
    store16(out + i, space.load16(i));
}
#endif
template <int count, bool transposed>
KERNEL(32)
store_matrices_kernel(const uint32_t* in, const int32_t* rows, uint8_t* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  store_matrices<count, transposed>(in, rows, out);
#endif
}
template <int count, bool transposed>
void run_store(const conformance::Call& call) {
  LAUNCH((store_matrices_kernel<count, transposed>), 1, 32, kSpace, call.stream,
         call.input<uint32_t>(0), call.input<int32_t>(1), call.output<uint8_t>());
}
CASE(stmatrix_1) { run_store<1, false>(call); }
CASE(stmatrix_2) { run_store<2, false>(call); }
CASE(stmatrix_4) { run_store<4, false>(call); }
CASE(stmatrix_transposed_1) { run_store<1, true>(call); }
CASE(stmatrix_transposed_2) { run_store<2, true>(call); }
CASE(stmatrix_transposed_4) { run_store<4, true>(call); }

// The transposes of matrices in[0], [matrix][lane].
KERNEL(32) transposed_matrices(const uint32_t* in, uint32_t* out) {
  const int64_t i = block_index() * 32 + lane_index();
  store(out + i, movmatrix_transposed(load(in + i)));
}
CASE(movmatrix_transposed) {
  LAUNCH(transposed_matrices, call.result_bytes / 128, 32, 0, call.stream, call.input<uint32_t>(0),
         call.output<uint32_t>());
}

// A block a product: a [block][lane][4], b [block][lane][2], and in the output d [block][lane][4].
enum class Mma { bf16, f16, tf32, s8 };
template <Mma kind, class D>
KERNEL(32)
products(const uint32_t* a, const uint32_t* b, D* out) {
  const int64_t lane = block_index() * 32 + lane_index();
  uint32_t left[4], right[2];
  D d[4];
  for (int i = 0; i < 4; ++i) left[i] = load(a + 4 * lane + i);
  for (int i = 0; i < 2; ++i) right[i] = load(b + 2 * lane + i);
  for (int i = 0; i < 4; ++i) d[i] = load(out + 4 * lane + i);
  if constexpr (kind == Mma::bf16) mma_m16n8k16<bf16>(d, left, right);
  if constexpr (kind == Mma::f16) mma_m16n8k16<f16>(d, left, right);
  if constexpr (kind == Mma::tf32) mma_m16n8k8(d, left, right);
  if constexpr (kind == Mma::s8) mma_m16n8k32(d, left, right);
  for (int i = 0; i < 4; ++i) store(out + 4 * lane + i, d[i]);
}
template <Mma kind, class D>
void run_products(const conformance::Call& call) {
  LAUNCH((products<kind, D>), call.result_bytes / 512, 32, 0, call.stream, call.input<uint32_t>(0),
         call.input<uint32_t>(1), call.output<D>());
}
CASE(mma_bf16) { run_products<Mma::bf16, float>(call); }
CASE(mma_f16) { run_products<Mma::f16, float>(call); }
CASE(mma_tf32) { run_products<Mma::tf32, float>(call); }
CASE(mma_s8) { run_products<Mma::s8, int32_t>(call); }

}  // namespace
}  // namespace warpformer::cuda
