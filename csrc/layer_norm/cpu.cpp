// A row of contiguous floats is read where it is and written once; others pass through a buffer of
// floats. Weight and bias become floats once per call:
//
//   x row + residual row --> z --mean; variance; normalize, scale, shift--> out row
#include "core/parallel.h"
#include "core/scratch.h"
#include "layer_norm/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

void normalize_row(const float* z, int64_t n, const float* weight, const float* bias, float eps,
                   float* out) {
  Sum values;
  for_lanes(n, [&](int64_t i, auto k) { values.add(load(z + i, k)); });
  const float rough = values.total() / static_cast<float>(n);
  Sum deviations, squares;
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec d = load_or(z + i, k, rough) - set(rough);
    deviations.add(d);
    squares.add(d * d);
  });
  // What rounding left of the mean shows in the deviations, and is taken out of both.
  const float off = deviations.total() / static_cast<float>(n);
  const float mean = rough + off;
  const float variance = squares.total() / static_cast<float>(n) - off * off;
  const float rstd = 1.0f / sqrtf((variance > 0.0f ? variance : 0.0f) + eps);
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec d = (load(z + i, k) - set(mean)) * set(rstd);
    store(out + i, fma(d, load(weight + i, k), load(bias + i, k)), k);
  });
}

/// The one row of `rows` as floats, all `otherwise` where it is not given.
const float* operand(const Rows& rows, float otherwise, int64_t n, float* buffer) {
  if (rows.data) return row_in(rows, 0, buffer);
  for_lanes(n, [&](int64_t i, auto k) { store(buffer + i, set(otherwise), k); });
  return buffer;
}

}  // namespace

void layer_norm(const LayerNormParams& p, int threads) {
  const int64_t n = p.x.n;
  float* scratch = scratch_floats((2 + 2 * threads) * n);
  const float* weight = operand(p.weight, 1.0f, n, scratch);
  const float* bias = operand(p.bias, 0.0f, n, scratch + n);
  parallel_for(p.x.count, 1 + 16384 / n, threads, [&](int t, int64_t begin, int64_t end) {
    float* buffer = scratch + (2 + 2 * t) * n;
    for (int64_t r = begin; r < end; ++r) {
      const float* z = row_in(p.x, r, buffer);
      if (p.residual.data) {
        const float* residual = row_in(p.residual, r, buffer + n);
        for_lanes(n, [&](int64_t i, auto k) {
          store(buffer + i, load(z + i, k) + load(residual + i, k), k);
        });
        z = buffer;
      }
      float* out = row_out(p.out, r, buffer);
      normalize_row(z, n, weight, bias, p.eps, out);
      finish_row(p.out, r, out);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
