// Each row is read once, turned into exponentials where it will be written, and scaled there; rows
// that are not contiguous floats pass through a buffer of floats:
//
//   x row --scale, mask--> z --max; exp, sum--> out row --/ sum--> out row
#include "core/parallel.h"
#include "core/scratch.h"
#include "softmax/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// z = scale * x
void scale_row(const float* x, int64_t n, float scale, float* z) {
  for_lanes(n, [&](int64_t i, auto k) { store(z + i, load(x + i, k) * set(scale), k); });
}

/// z = scale * x + mask, but -inf where the mask is, even if x is NaN.
void mask_row(const float* x, const Rows& mask, int64_t r, float scale, float* z) {
  if (mask.dtype == DType::boolean) {
    const bool* keep = static_cast<const bool*>(mask.data) + row_offset(mask, r);
    for (int64_t i = 0; i < mask.n; ++i) z[i] = keep[i * mask.step] ? x[i] * scale : -INFINITY;
    return;
  }
  const float* bias = row_in(mask, r, z);
  for_lanes(mask.n, [&](int64_t i, auto k) {
    const Vec b = load(bias + i, k);
    const Vec masked = fma(load(x + i, k), set(scale), b);
    store(z + i, where_less(b, set(-__FLT_MAX__), b, masked), k);
  });
}

void normalize_row(const float* z, int64_t n, float* out) {
  Vec high = set(-INFINITY);
  for_lanes(n, [&](int64_t i, auto k) { high = max(high, load_or(z + i, k, -INFINITY)); });
  const float top = max_lane(high);
  const Vec shift = set(top == -INFINITY ? 0.0f : top);
  Sum total;
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec e = exp(load_or(z + i, k, -INFINITY) - shift);
    store(out + i, e, k);
    total.add(e);
  });
  // Where nothing is kept, every exponential is 0, and 0 / 1 is the result.
  const float denominator = total.total();
  const Vec divisor = set(denominator == 0.0f ? 1.0f : denominator);
  for_lanes(n, [&](int64_t i, auto k) { store(out + i, load(out + i, k) / divisor, k); });
}

}  // namespace

void softmax(const SoftmaxParams& p, int threads) {
  const int64_t n = p.x.n;
  float* scratch = scratch_floats(2 * n * threads);
  parallel_for(p.x.count, 1 + 16384 / n, threads, [&](int t, int64_t begin, int64_t end) {
    float* buffer = scratch + 2 * n * t;
    float* z = buffer + n;
    for (int64_t r = begin; r < end; ++r) {
      const float* x = row_in(p.x, r, buffer);
      if (p.has_mask) {
        mask_row(x, p.mask, r, p.scale, z);
      } else if (p.scale != 1.0f) {
        scale_row(x, n, p.scale, z);
      }
      float* out = row_out(p.out, r, buffer);
      normalize_row(p.has_mask || p.scale != 1.0f ? z : x, n, out);
      finish_row(p.out, r, out);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
