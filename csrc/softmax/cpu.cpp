// Each row is read once into a buffer of floats, turned into exponentials there, and written once:
//
//   x row --scale, mask--> buffer --max; exp, sum; * 1/sum--> buffer --> out row
#include "core/dispatch.h"
#include "core/parallel.h"
#include "softmax/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

void scale_row(float* z, int64_t n, float scale) {
  for_lanes(n, [&](int64_t i, auto k) { store(z + i, load(z + i, k) * set(scale), k); });
}

/// z = scale * z + mask, but -inf where the mask is, even if z is NaN.
void mask_row(const Rows& mask, int64_t r, float scale, float* bias, float* z) {
  if (mask.dtype == DType::boolean) {
    const bool* keep = static_cast<const bool*>(mask.data) + row_offset(mask, r);
    for (int64_t i = 0; i < mask.n; ++i)
      z[i] = keep[i * mask.step] ? z[i] * scale : -INFINITY;
    return;
  }
  by_float(mask.dtype, [&](auto t) { read_row<decltype(t)>(mask, r, bias); });
  for_lanes(mask.n, [&](int64_t i, auto k) {
    const Vec b = load(bias + i, k);
    const Vec sum = fma(load(z + i, k), set(scale), b);
    store(z + i, where_less(b, set(-__FLT_MAX__), b, sum), k);
  });
}

void normalize_row(float* z, int64_t n) {
  Vec high = set(-INFINITY);
  for_lanes(n, [&](int64_t i, auto k) { high = max(high, load_or(z + i, k, -INFINITY)); });
  const float top = max_lane(high);
  const Vec shift = set(top == -INFINITY ? 0.0f : top);
  Vec total = set(0.0f);
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec e = exp(load_or(z + i, k, -INFINITY) - shift);
    store(z + i, e, k);
    total = total + e;
  });
  const float denominator = sum(total);
  scale_row(z, n, denominator == 0.0f ? 0.0f : 1.0f / denominator);
}

}  // namespace

void softmax(const SoftmaxParams& p) {
  const int64_t n = p.x.n;
  by_float(p.x.dtype, [&](auto x) {
    by_float(p.out.dtype, [&](auto out) {
      parallel_for(p.x.count, 1 + 16384 / n, p.threads, [&](int t, int64_t begin, int64_t end) {
        float* z = p.scratch + 2 * n * t;
        for (int64_t r = begin; r < end; ++r) {
          read_row<decltype(x)>(p.x, r, z);
          if (p.has_mask) {
            mask_row(p.mask, r, p.scale, z + n, z);
          } else if (p.scale != 1.0f) {
            scale_row(z, n, p.scale);
          }
          normalize_row(z, n);
          write_row<decltype(out)>(z, p.out, r);
        }
      });
    });
  });
}

}  // namespace warpformer::cpu::WF_ISA
