// The gradient of linear's x, dx = dy W: the product of product.h, of a weight that is transposed
// and freed of its scales block by block:
//
//   panel of 16 n  --unpack-->  16 k x 16 n  --scale, transpose-->  words of a panel of 16 k   (L1)
#include "linear/product.h"

namespace warpformer::cpu::WF_ISA {
namespace {

struct Transposed {
  static constexpr bool kIsPacked = false;
  const Weight& w;
  int64_t columns;  // of dy

  int64_t depth() const { return columns; }
  int64_t panels() const { return (w.depth + kPanel - 1) / kPanel; }
  bool has_zeros() const { return false; }
  bool has_factors() const { return false; }
  template <class Word>
  int64_t length() const {
    return columns;
  }

  template <class F>
  void words(int64_t panel, int64_t count, int64_t first, int64_t n, bool, float* scratch, float,
             const F& f) const {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t j = 0; j < n; j += kPanel)
        transpose((first + j) / kPanel, (panel + p) * kPanel, scratch + (p * kDepth + j) * kPanel);
    f(Panels{scratch, kDepth * kPanel, kPanel});
  }

  /// to[j][i] = W[16 panel + j][k + i]
  void transpose(int64_t panel, int64_t k, float* to) const {
    const uint8_t* data = w.data + panel * w.size;
    float block[(kPanel + 8) * kPanel], scales[kPanel], zeros[kPanel];
    const int64_t n = at_most(kPanel, w.depth - k), group = w.groups ? k / w.group : 0;
    with_values<Kind::plain>(w, data, k, 0.0f, [&](const auto& b) { unpack(b, 0, 0, n, block); });
    const auto* factors = reinterpret_cast<const float*>(data + w.factors);
    const f16* of_group = w.groups ? scales_of(w, data, group) : nullptr;
    if (w.zeros) unpack_zeros(w, data, group, zeros);
    for (int64_t j = 0; j < kPanel; ++j) {
      const float factor = w.factors ? factors[j] : 1.0f;
      scales[j] = of_group ? factor * to_float(of_group[j]) : factor;
      zeros[j] = w.zeros ? factor * zeros[j] : 0.0f;
    }
    for (int64_t i = 0; i < kPanel; ++i)
      for (int64_t j = 0; j < kPanel; ++j)
        to[j * kPanel + i] = i < n ? block[i * kPanel + j] * scales[j] + zeros[j] : 0.0f;
  }
};

}  // namespace

void linear_backward(const LinearBackwardParams& p, int threads) {
  LinearParams product{p.dy, {}, {}, p.dx, p.weight};
  product.first = p.first, product.rows = p.rows;
  Product<float, 1, Kind::plain, Transposed>(product, {product.weight, p.dy.n}).run(threads);
}

}  // namespace warpformer::cpu::WF_ISA
