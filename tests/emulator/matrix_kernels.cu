// Kernels that use ldmatrix and mma, with a bug that can be switched on; the lines marked "caught:
// <name>" are those the emulator names.
#include "core/cuda/matrix.cuh"
#include "core/cuda/ptx.cuh"
#include "core/cuda/swizzle.cuh"
#include "emulator/self_test.h"

namespace warpformer::cuda {
namespace {

constexpr int kTile = 16;  // 16 x 16 tiles of bf16

/// Writes the tile (as rounded) that the warp's fragment of A holds.
DEVICE void write_fragment(const uint32_t (&a)[4], float* out) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int r = 0; r < 4; ++r) {
    float low, high;
    unpack2<bf16>(a[r], low, high);
    float* at = out + (g + r % 2 * 8) * kTile + 2 * t + r / 2 * 8;
    store(at, low);
    store(at + 1, high);
  }
}

/// Each lane puts half a row of the tile into shared memory, `pitch` elements a row.
DEVICE void fill_tile(Shared<bf16> tile, const float* in, int pitch) {
  const int row = lane_index() / 2, half = lane_index() % 2;
  Vector<bf16> v;
  for (int i = 0; i < 8; ++i) v[i] = from_float<bf16>(load(in + row * kTile + half * 8 + i));
  tile.store16(row * pitch + half * 8, v);
}

/// The address that the lane gives for the tile's four matrices.
DEVICE Shared<bf16> row_of_lane(Shared<bf16> tile, int pitch) {
  return tile + (lane_index() % kTile * pitch + lane_index() / kTile * 8);
}

/// The copy of a tile through ldmatrix. Broken: the lanes of the upper half give the lower half's
/// rows.
KERNEL(32) ldmatrix_rows(const float* in, float* out, bool broken) {
  const auto tile = shared_memory<bf16>();
  fill_tile(tile, in, kTile);
  sync_warp();
  uint32_t a[4];
  ldmatrix(a, broken ? tile + lane_index() % kTile * kTile : row_of_lane(tile, kTile));
  write_fragment(a, out);
}

KERNEL(32) ldmatrix_misaligned(const float* in, float* out, bool broken) {
  const auto tile = shared_memory<bf16>();
  fill_tile(tile, in, kTile);
  sync_warp();
  uint32_t a[4];
  const int off = broken && lane_index() == 13 ? 4 : 0;
  ldmatrix(a, row_of_lane(tile, kTile) + off);  // caught: ldmatrix_misaligned
  write_fragment(a, out);
}

KERNEL(32) ldmatrix_out_of_bounds(const float* in, float* out, bool broken) {
  const auto tile = shared_memory<bf16>();
  fill_tile(tile, in, kTile);
  sync_warp();
  uint32_t a[4];
  ldmatrix(a, row_of_lane(tile, broken ? 2 * kTile : kTile));  // caught: ldmatrix_out_of_bounds
  write_fragment(a, out);
}

/// ldmatrix reads what other lanes wrote: it needs sync_warp.
KERNEL(32) ldmatrix_race(const float* in, float* out, bool broken) {
  const auto tile = shared_memory<bf16>();
  fill_tile(tile, in, kTile);
  if (!broken) sync_warp();
  uint32_t a[4];
  ldmatrix(a, row_of_lane(tile, kTile));  // caught: ldmatrix_race
  write_fragment(a, out);
}

/// stmatrix writes for others to read.
KERNEL(32) stmatrix_race(const float* in, float* out, bool broken) {
  const auto tile = shared_memory<bf16>();
  fill_tile(tile, in, kTile);
  sync_warp();
  uint32_t a[4];
  ldmatrix(a, row_of_lane(tile, kTile));
  sync_warp();
  stmatrix(row_of_lane(tile, kTile), a);
  if (!broken) sync_warp();
  const int row = lane_index() / 2, half = lane_index() % 2 * 8;
  for (int i = 0; i < 8; ++i)
    store(out + row * kTile + half + i,
          to_float(tile.load(row * kTile + half + i)));  // caught: stmatrix_race
}

/// Rows of 128 bytes, their chunks swizzled. Broken: ldmatrix reads as if they were not.
KERNEL(32) ldmatrix_swizzle(const float* in, float* out, bool broken) {
  constexpr int pitch = 64;
  const auto tile = shared_memory<bf16>() +
                    static_cast<int>((1024 - shared_memory<bf16>().address() % 1024) % 1024 / 2);
  const int row = lane_index() / 2, half = lane_index() % 2;
  for (int i = 0; i < 8; ++i) {
    const auto offset = static_cast<uint32_t>(2 * (row * pitch + half * 8 + i));
    tile.store(static_cast<int>(swizzle<Swizzle::bytes128>(offset) / 2),
               from_float<bf16>(load(in + row * kTile + half * 8 + i)));
  }
  sync_block();
  // The rest of the rows is read by nobody who swizzles; fill it for those who do not.
  for (int i = lane_index(); i < kTile * pitch; i += 32) {
    const uint32_t plain = swizzle<Swizzle::bytes128>(static_cast<uint32_t>(2 * i)) / 2;
    if (plain % pitch >= kTile) tile.store(i, from_float<bf16>(-1.0f));
  }
  sync_block();
  const auto offset =
      static_cast<uint32_t>(2 * (lane_index() % kTile * pitch + lane_index() / kTile * 8));
  uint32_t a[4];
  ldmatrix(a, tile + static_cast<int>((broken ? offset : swizzle<Swizzle::bytes128>(offset)) / 2));
  write_fragment(a, out);
}

/// x I, in one mma: the lower half of the lanes must not go another way.
KERNEL(32) mma_divergent(const float* in, float* out, bool broken) {
  const auto tile = shared_memory<bf16>();
  fill_tile(tile, in, kTile);
  sync_warp();
  uint32_t a[4];
  ldmatrix(a, row_of_lane(tile, kTile));
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int j = 0; j < 2; ++j) {
    uint32_t b[2];
    for (int r = 0; r < 2; ++r) {
      const int k = 2 * t + 8 * r, n = 8 * j + g;
      b[r] = pack2<bf16>(k == n ? 1.0f : 0.0f, k + 1 == n ? 1.0f : 0.0f);
    }
    float d[4] = {};
    if (broken && lane_index() < 16) {
      mma_m16n8k16<bf16>(d, a, b);  // caught: mma_divergent
    } else {
      mma_m16n8k16<bf16>(d, a, b);  // caught: mma_divergent
    }
    for (int i = 0; i < 4; ++i) store(out + (g + i / 2 * 8) * kTile + 8 * j + 2 * t + i % 2, d[i]);
  }
}

}  // namespace
}  // namespace warpformer::cuda

namespace warpformer::emulator {

void bind_matrix(py::module_& m) {
  using namespace warpformer::cuda;
  PLANT(ldmatrix_rows, 1, 32, 512);
  PLANT(ldmatrix_misaligned, 1, 32, 512);
  PLANT(ldmatrix_out_of_bounds, 1, 32, 512);
  PLANT(ldmatrix_race, 1, 32, 512);
  PLANT(stmatrix_race, 1, 32, 512);
  PLANT(ldmatrix_swizzle, 1, 32, 2048 + 1024);
  PLANT(mma_divergent, 1, 32, 512);
}

}  // namespace warpformer::emulator
