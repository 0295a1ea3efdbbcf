// x row --+ bias, gelu--> out row; rows that are not contiguous floats pass through a buffer of
// floats
#include "activation/op.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace warpformer::cpu::WF_ISA {
namespace {

template <class Function>
void map_rows(const GeluParams& p, int threads, const Function& function) {
  const int64_t n = p.x.n;
  float* scratch = scratch_floats((1 + threads) * n);
  const float* bias = p.bias.data ? row_in(p.bias, 0, scratch) : nullptr;
  parallel_for(p.x.count, 1 + 16384 / n, threads, [&](int t, int64_t begin, int64_t end) {
    float* buffer = scratch + (1 + t) * n;
    for (int64_t r = begin; r < end; ++r) {
      const float* x = row_in(p.x, r, buffer);
      float* out = row_out(p.out, r, buffer);
      for_lanes(n, [&](int64_t i, auto k) {
        const Vec z = load(x + i, k);
        store(out + i, function(bias ? z + load(bias + i, k) : z), k);
      });
      finish_row(p.out, r, out);
    }
  });
}

}  // namespace

void gelu(const GeluParams& p, int threads) {
  if (p.tanh_form) {
    map_rows(p, threads, [](Vec x) { return gelu_tanh(x); });
  } else {
    map_rows(p, threads, [](Vec x) { return gelu(x); });
  }
}

}  // namespace warpformer::cpu::WF_ISA
