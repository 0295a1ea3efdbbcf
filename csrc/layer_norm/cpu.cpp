// Each row is read once into a buffer of floats and written once; weight and bias become floats once
// per call:
//
//   x row + residual row --> buffer --mean; variance; normalize, scale, shift--> buffer --> out row
#include "core/dispatch.h"
#include "core/parallel.h"
#include "layer_norm/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

void normalize_row(float* z, int64_t n, const float* weight, const float* bias, float eps) {
  Vec total = set(0.0f);
  for_lanes(n, [&](int64_t i, auto k) { total = total + load(z + i, k); });
  const float mean = sum(total) / static_cast<float>(n);
  Vec squares = set(0.0f);
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec d = load_or(z + i, k, mean) - set(mean);
    squares = fma(d, d, squares);
  });
  const float rstd = 1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps);
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec d = (load(z + i, k) - set(mean)) * set(rstd);
    store(z + i, fma(d, load(weight + i, k), load(bias + i, k)), k);
  });
}

void fill_row(const Rows& rows, float otherwise, int64_t n, float* dst) {
  if (rows.data) {
    by_float(rows.dtype, [&](auto t) { read_row<decltype(t)>(rows, 0, dst); });
  } else {
    for_lanes(n, [&](int64_t i, auto k) { store(dst + i, set(otherwise), k); });
  }
}

}  // namespace

void layer_norm(const LayerNormParams& p) {
  const int64_t n = p.x.n;
  float* weight = p.scratch;
  float* bias = weight + n;
  fill_row(p.weight, 1.0f, n, weight);
  fill_row(p.bias, 0.0f, n, bias);
  by_float(p.x.dtype, [&](auto x) {
    by_float(p.out.dtype, [&](auto out) {
      parallel_for(p.x.count, 1 + 16384 / n, p.threads, [&](int t, int64_t begin, int64_t end) {
        float* z = p.scratch + (2 + 2 * t) * n;
        float* residual = z + n;
        for (int64_t r = begin; r < end; ++r) {
          read_row<decltype(x)>(p.x, r, z);
          if (p.residual.data) {
            by_float(p.residual.dtype,
                     [&](auto t) { read_row<decltype(t)>(p.residual, r, residual); });
            for_lanes(n, [&](int64_t i, auto k) {
              store(z + i, load(z + i, k) + load(residual + i, k), k);
            });
          }
          normalize_row(z, n, weight, bias, p.eps);
          write_row<decltype(out)>(z, p.out, r);
        }
      });
    });
  });
}

}  // namespace warpformer::cpu::WF_ISA
