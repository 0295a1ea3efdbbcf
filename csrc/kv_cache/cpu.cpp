// append_to_cache_: a thread takes a run of the new tokens; of each it copies, or quantizes, every
// head to its slot. copy_blocks_: a thread takes the same bytes of all blocks.
#include <math.h>
#include <string.h>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/rows.h"
#include "kv_cache/op.h"
#include "kv_cache/slots.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread

template <class From, class To>
void copy(const From* x, int64_t step, int64_t n, To* out) {
  if (step == 1) {
    for_lanes(n, [&](int64_t i, auto k) { store(out + i, load(x + i, k), k); });
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<To>(to_float(x[i * step]));
  }
}

/// Rounds to nearest even; a head of zeros has scale 0. NaN and infinity become a scale that is
/// NaN, which attention shows. Also by a scale in bf16, 2^-9 off, nothing is beyond 127.25.
template <class From, class Scale>
void quantize(const From* x, int64_t step, int64_t n, int8_t* out, Scale* scale) {
  float high = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = __builtin_fabsf(to_float(x[i * step]));
    if (!(magnitude <= high)) high = magnitude;
    if (magnitude != magnitude) break;
  }
  const bool finite = high < INFINITY, zero = high < 0x1p-110f;  // others are normal numbers
  *scale = from_float<Scale>(!finite ? NAN : zero ? 0.0f : high / 127.0f);
  const float inverse = finite && !zero ? 1.0f / to_float(*scale) : 0.0f;
  for (int64_t i = 0; i < n; ++i)
    out[i] = finite ? static_cast<int8_t>(rintf(to_float(x[i * step]) * inverse)) : 0;
}

void append_token(const Heads& x, Slot token, const Heads& cache, const Heads& scales, Slot slot,
                  int64_t heads, int64_t width) {
  by_float(x.dtype, [&](auto type) {
    using From = decltype(type);
    for (int64_t h = 0; h < heads; ++h) {
      const From* row = at<From>(x, token, h);
      if (cache.dtype == DType::i8)
        by_float(scales.dtype, [&](auto scale) {
          quantize(row, x.stride[3], width, at<int8_t>(cache, slot, h),
                   at<decltype(scale)>(scales, slot, h));
        });
      by_float(cache.dtype,
               [&](auto to) { copy(row, x.stride[3], width, at<decltype(to)>(cache, slot, h)); });
    }
  });
}

}  // namespace

void append_to_cache_(const AppendParams& p, int threads) {
  const KvCache& c = p.cache;
  const int64_t grain = 1 + kGrain / (c.kv_heads * (c.width + c.value_width) + 1);
  const int64_t all = p.tokens.count * (p.tokens.cu_seqlens ? 1 : c.batch);
  parallel_for(all, grain, threads, [&](int, int64_t begin, int64_t end) {
    int64_t before = 0;  // tokens of the sequences before
    for (int64_t b = 0; b < c.batch && before < end; ++b) {
      const Part part = part_of(p.tokens, b);
      for (int64_t i = larger(0, begin - before); i < smaller(part.count, end - before); ++i) {
        const Slot token{part.batch, part.first + i}, slot = slot_of(c, b, c.lengths[b] + i);
        append_token(p.k, token, c.k, c.k_scales, slot, c.kv_heads, c.width);
        append_token(p.v, token, c.v, c.v_scales, slot, c.kv_heads, c.value_width);
      }
      before += part.count;
    }
  });
}

void append_positions(const AppendPositionsParams& p, int) {
  int32_t* to = p.positions;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < part_of(p.tokens, b).count; ++i)
      *to++ = static_cast<int32_t>(p.lengths[b] + i);
}

void copy_blocks_(const CopyBlocksParams& p, int threads) {
  constexpr int64_t kLine = 64;
  const int64_t lines = (p.bytes + kLine - 1) / kLine;
  const int64_t grain = 1 + kGrain / (16 * (p.copies + 1));
  parallel_for(lines, grain, threads, [&](int, int64_t begin, int64_t end) {
    const int64_t first = begin * kLine, n = smaller(end * kLine, p.bytes) - first;
    for (int64_t i = 0; i < p.copies; ++i)
      if (p.old_blocks[i] != p.new_blocks[i])
        memcpy(p.data + p.new_blocks[i] * p.block + first,
               p.data + p.old_blocks[i] * p.block + first, n);
  });
}

}  // namespace warpformer::cpu::WF_ISA
