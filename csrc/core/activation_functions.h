// The functions of core/activation.h and their derivatives, written once for both devices: a Vec is
// a register of floats in cpu.cpp (core/simd.h), one float in cuda.cu (core/cuda/activation.cuh).
#pragma once

#include "core/activation.h"

#if defined(WF_ISA)
#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

/// e^x for x in [-104, 89], relative error 1e-4.
WF_INLINE Vec exp_rough(Vec x) {
  const Vec n = round(x * set(1.44269504f)), r = fma(n, set(-0.693147182f), x);
  Vec p = set(0.165668413f);
  p = fma(p, r, set(0.504963279f));
  p = fma(p, r, set(1.00016415f));
  p = fma(p, r, set(0.999928057f));
  return scale_by_power(p, n);
}

#else
namespace warpformer::cuda::lane {
#endif

/// A function and its derivative at the same points.
struct ValueAndSlope {
  Vec value, slope;
};

struct Identity {
  static WF_INLINE Vec value(Vec z) { return z; }
  static WF_INLINE ValueAndSlope both(Vec z) { return {z, set(1.0f)}; }
};

struct Relu {
  static WF_INLINE Vec value(Vec z) { return max(set(0.0f), z); }
  static WF_INLINE ValueAndSlope both(Vec z) {
    return {value(z), where_less(set(0.0f), z, set(1.0f), set(0.0f))};
  }
};

struct Relu2 {
  static WF_INLINE Vec value(Vec z) { return both(z).value; }
  static WF_INLINE ValueAndSlope both(Vec z) {
    const Vec positive = max(set(0.0f), z);
    return {positive * positive, positive + positive};
  }
};

struct Tanh {
  static WF_INLINE Vec value(Vec z) { return tanh(z); }
  static WF_INLINE ValueAndSlope both(Vec z) {
    const Vec t = tanh(z);
    return {t, fma(set(0.0f) - t, t, set(1.0f))};
  }
};

// s(t) = 1 / (1 + e^-t) and 1 - s: silu is z s(z), and gelu_tanh of that form too. The bound keeps
// e^-t finite; where it acts, s is 1e-38.
struct Sigmoid {
  Vec s, complement;
  WF_INLINE explicit Sigmoid(Vec t) {
    const Vec e = exp(min(set(88.0f), set(0.0f) - t)), sum = set(1.0f) + e;
    const Vec rough = set(1.0f) / sum;
    // What rounding left of the quotient and of the sum, to first order.
    const Vec off = fma(set(0.0f) - rough, sum, set(1.0f)) - rough * (e - (sum - set(1.0f)));
    s = fma(rough, off, rough);
    complement = where_less(e, set(0.25f), e * s, set(1.0f) - s);  // the latter cancels near s = 1
  }
};

struct Silu {
  static WF_INLINE Vec value(Vec v) {
    const Vec z = max(set(-200.0f), v);  // below, the result is 0; -inf * 0 would not be
    return z / (set(1.0f) + exp(set(0.0f) - z));
  }
  static WF_INLINE ValueAndSlope both(Vec v) {
    const Vec z = min(set(200.0f), max(set(-200.0f), v));
    const Sigmoid sigmoid(z);
    return {max(z, v) * sigmoid.s, sigmoid.s * fma(z, sigmoid.complement, set(1.0f))};
  }
};

#if defined(WF_ISA) && defined(__AVX512F__)
/// Phi(-a) by polynomials around 32 points, off by at most 3e-8: half a unit in the last place of
/// 1/2.
struct NormalTail {
  static constexpr int kPoints = 32, kDegree = 4;
  static constexpr float kStep = 0.2f, kEnd = kStep * (kPoints - 1);  // where it is 0
  alignas(64) float coefficients[kDegree + 1][kPoints] = {};

  constexpr NormalTail() {
    // Chebyshev's nodes; divided differences of the values there make the polynomial.
    constexpr double kNodes[] = {-0.47552825814757678, -0.29389262614623657, 0, 0.29389262614623657,
                                 0.47552825814757678};
    for (int i = 0; i + 1 < kPoints; ++i) {
      double d[kDegree + 1] = {}, c[kDegree + 1] = {};
      for (int k = 0; k <= kDegree; ++k) d[k] = exact((i + kNodes[k]) * double{kStep});
      for (int j = 1; j <= kDegree; ++j)
        for (int k = kDegree; k >= j; --k) d[k] = (d[k] - d[k - 1]) / (kNodes[k] - kNodes[k - j]);
      for (int k = kDegree; k >= 0; --k) {
        for (int j = kDegree; j > 0; --j) c[j] = c[j - 1] - kNodes[k] * c[j];
        c[0] = d[k] - kNodes[k] * c[0];
      }
      for (int j = 0; j <= kDegree; ++j) coefficients[j][i] = static_cast<float>(c[j]);
    }
  }
  /// 1/2 - phi(a) (a + a^3 / 3 + a^5 / (3 5) + ..)
  static constexpr double exact(double a) {
    double power = 1, exponential = 1, term = a, sum = a;
    for (int n = 1; n < 100; ++n) {
      exponential += power *= a * a / 2 / n;
      sum += term *= a * a / (2 * n + 1);
    }
    return 0.5 - 0.39894228040143268 / exponential * sum;
  }

  WF_INLINE Vec operator()(Vec a) const {
    const Vec shift = set(0x1.8p23f), scale = set(1 / kStep);
    const Vec place = fma(a, scale, shift);  // the nearest point, in its lowest bits
    const Vec t = fma(a, scale, shift - place);
    Vec p = at(kDegree, place);
    for (int j = kDegree - 1; j >= 0; --j) p = fma(p, t, at(j, place));
    return p;
  }
  WF_INLINE Vec at(int j, Vec place) const {
    return {_mm512_permutex2var_ps(load(coefficients[j]).v, _mm512_castps_si512(place.v),
                                   load(coefficients[j] + Vec::kWidth).v)};
  }
};
constexpr NormalTail kNormalTail;
#endif

// gelu(z) = max(z, 0) - |z| Phi(-|z|): no cancellation on either side.
struct Gelu {
#if defined(WF_ISA) && defined(__AVX512F__)
  static WF_INLINE Vec value(Vec z) {
    const Vec a = min(set(NormalTail::kEnd), abs(z));
    return max(set(0.0f), z) - a * kNormalTail(a);
  }
#else
  // Phi(-a) = exp(-a^2 / 2 + R(a)), R a minimax polynomial on [0, 6] (beyond, the term is below
  // 6e-9).
  static WF_INLINE Vec value(Vec z) {
    const Vec a = min(set(40.0f), abs(z)), bounded = min(set(6.0f), a);
    Vec r = set(2.15554752e-09f);
    r = fma(r, bounded, set(-7.8046682e-08f));
    r = fma(r, bounded, set(1.25290649e-06f));
    r = fma(r, bounded, set(-1.16735937e-05f));
    r = fma(r, bounded, set(6.8002606e-05f));
    r = fma(r, bounded, set(-0.000227484052f));
    r = fma(r, bounded, set(4.50198058e-05f));
    r = fma(r, bounded, set(0.00478125457f));
    r = fma(r, bounded, set(-0.0363367349f));
    r = fma(r, bounded, set(0.181690589f));
    r = fma(r, bounded, set(-0.797884643f));
    r = fma(r, bounded, set(-0.693147182f));
    const Vec tail = exp(fma(a * a, set(-0.5f), r));
    return max(set(0.0f), z) - a * tail;
  }
#endif
  // The slope at -a is Phi(-a) - a phi(a) = e^(-a^2 / 2) D(a), at a 1 less that. D is a minimax
  // polynomial on [0, 6] and linear beyond, where Phi(-a) no longer counts.
  static WF_INLINE ValueAndSlope both(Vec z) {
    const Vec a = min(set(40.0f), abs(z)), bounded = min(set(6.0f), a);
    const Vec density = set(0.3989422804f);
    Vec d = set(2.34652529e-08f);
    d = fma(d, bounded, set(-7.77505932e-07f));
    d = fma(d, bounded, set(1.15243329e-05f));
    d = fma(d, bounded, set(-0.000101969432f));
    d = fma(d, bounded, set(0.000609652139f));
    d = fma(d, bounded, set(-0.0026640913f));
    d = fma(d, bounded, set(0.00907218177f));
    d = fma(d, bounded, set(-0.0255022962f));
    d = fma(d, bounded, set(0.0619256794f));
    d = fma(d, bounded, set(-0.13280341f));
    d = fma(d, bounded, set(0.249972582f));
    d = fma(d, bounded, set(-0.797883093f));
    d = fma(d, bounded, set(0.5f));
    d = fma(density, bounded - a, d);
    const Vec e = exp(a * a * set(-0.5f));
    const Vec tail = e * fma(density, a, d), left = e * d;
    return {max(set(0.0f), z) - a * tail, where_less(set(0.0f), z, set(1.0f) - left, left)};
  }
};

/// Gelu for a result of 16 bits, whose rounding hides relative errors of 1e-4: shorter polynomials.
struct GeluHalf {
  static WF_INLINE Vec value(Vec z) {
    const Vec a = min(set(14.0f), abs(z)), bounded = min(set(6.0f), a);
    Vec r = set(1.59354968e-05f);
    r = fma(r, bounded, set(-0.0004235823f));
    r = fma(r, bounded, set(0.00498758629f));
    r = fma(r, bounded, set(-0.0354789719f));
    r = fma(r, bounded, set(0.180270672f));
    r = fma(r, bounded, set(-0.797240019f));
    r = fma(r, bounded, set(-0.693192065f));
    return max(set(0.0f), z) - a * exp_rough(fma(a * a, set(-0.5f), r));
  }
  static WF_INLINE ValueAndSlope both(Vec z) { return Gelu::both(z); }
};

struct GeluTanh {
  static constexpr float kScale = 2 * 0.7978845608f, kCubic = 0.044715f;
  static WF_INLINE Vec value(Vec v) {
    const Vec z = max(set(-40.0f), v);  // below, the result is 0; -inf / inf would not be
    const Vec t = z * fma(z * z, set(kScale * kCubic), set(kScale));
    return z / (set(1.0f) + exp(set(0.0f) - t));
  }
  static WF_INLINE ValueAndSlope both(Vec v) {
    const Vec z = min(set(40.0f), max(set(-40.0f), v)), square = z * z;
    const Sigmoid sigmoid(z * fma(square, set(kScale * kCubic), set(kScale)));
    const Vec t_slope = fma(square, set(3 * kScale * kCubic), set(kScale));
    return {max(z, v) * sigmoid.s, sigmoid.s * fma(z * sigmoid.complement, t_slope, set(1.0f))};
  }
};

/// f(Gelu{}) for Activation::gelu, and so on; `half`: the result is rounded to 16 bits.
template <class F>
WF_INLINE void by_activation(Activation activation, bool half, F&& f) {
  switch (activation) {
    case Activation::none:
      return f(Identity{});
    case Activation::relu:
      return f(Relu{});
    case Activation::relu2:
      return f(Relu2{});
    case Activation::silu:
      return f(Silu{});
    case Activation::tanh:
      return f(Tanh{});
    case Activation::gelu:
      return half ? f(GeluHalf{}) : f(Gelu{});
    case Activation::gelu_tanh:
      return f(GeluTanh{});
  }
}

#if defined(WF_ISA)
}  // namespace warpformer::cpu::WF_ISA
#else
}  // namespace warpformer::cuda::lane
#endif
