// x row --> buffer of floats --+ bias, gelu--> buffer --> out row
#include "activation/op.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace warpformer::cpu::WF_ISA {
namespace {

template <class Function>
void map_rows(const GeluParams& p, const Function& function) {
  const int64_t n = p.x.n;
  float* bias = p.scratch;
  if (p.bias.data) {
    by_float(p.bias.dtype, [&](auto t) { read_row<decltype(t)>(p.bias, 0, bias); });
  } else {
    for_lanes(n, [&](int64_t i, auto k) { store(bias + i, set(0.0f), k); });
  }
  by_float(p.x.dtype, [&](auto x) {
    by_float(p.out.dtype, [&](auto out) {
      parallel_for(p.x.count, 1 + 16384 / n, p.threads, [&](int t, int64_t begin, int64_t end) {
        float* z = p.scratch + (1 + t) * n;
        for (int64_t r = begin; r < end; ++r) {
          read_row<decltype(x)>(p.x, r, z);
          for_lanes(n, [&](int64_t i, auto k) {
            store(z + i, function(load(z + i, k) + load(bias + i, k)), k);
          });
          write_row<decltype(out)>(z, p.out, r);
        }
      });
    });
  });
}

}  // namespace

void gelu(const GeluParams& p) {
  if (p.tanh_form) {
    map_rows(p, [](Vec x) { return gelu_tanh(x); });
  } else {
    map_rows(p, [](Vec x) { return gelu(x); });
  }
}

}  // namespace warpformer::cpu::WF_ISA
