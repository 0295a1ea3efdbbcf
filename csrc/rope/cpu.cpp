// A thread takes a run of tokens. For each, the row of the tables is brought to the form of the
// heads' registers once, and all its heads are rotated:
//
//   half:         c = cos          s = +-sin             x[i], x[i + R/2]        --> out
//   interleaved:  c = cos, cos...  s = -+sin, +-sin...   x c + (x swapped) s     --> out
//
// Heads of one dtype without steps are read and written where they lie, others pass through a
// buffer of floats.
#include "core/parallel.h"
#include "core/scratch.h"
#include "rope/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread

int64_t position_of(const RopeParams& p, int64_t token) {
  if (!p.positions.data) return token % p.length;
  const int64_t at = row_offset(p.positions, token);
  return p.positions.dtype == DType::i64 ? static_cast<const int64_t*>(p.positions.data)[at]
                                         : static_cast<const int32_t*>(p.positions.data)[at];
}

/// c and s of a position: R/2 floats each in the half form, else R.
void read_tables(const RopeParams& p, int64_t position, float* c, float* s) {
  const float *cos = p.cos + position * p.pairs, *sin = p.sin + position * p.pairs;
  const float sign = p.conjugate ? -1.0f : 1.0f;
  if (p.interleaved) {
    for (int64_t i = 0; i < p.pairs; ++i) {
      c[2 * i] = c[2 * i + 1] = cos[i];
      s[2 * i] = -sign * sin[i];
      s[2 * i + 1] = sign * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < p.pairs; ++i) {
    c[i] = cos[i];
    s[i] = sign * sin[i];
  }
}

template <class T>
void rotate_half(const T* x, const float* c, const float* s, int64_t pairs, T* out) {
  for_lanes(pairs, [&](int64_t i, auto k) {
    const Vec a = load(x + i, k), b = load(x + pairs + i, k), cos = load(c + i, k),
              sin = load(s + i, k);
    store(out + i, fma(a, cos, set(0.0f) - b * sin), k);
    store(out + pairs + i, fma(b, cos, a * sin), k);
  });
}

template <class T>
void rotate_interleaved(const T* x, const float* c, const float* s, int64_t pairs, T* out) {
  for_lanes(2 * pairs, [&](int64_t i, auto k) {
    const Vec v = load(x + i, k);
    store(out + i, fma(v, load(c + i, k), swap_neighbours(v) * load(s + i, k)), k);
  });
}

template <class T>
void rotate(const RopeParams& p, const T* x, const float* c, const float* s, int64_t n, T* out) {
  if (p.interleaved) {
    rotate_interleaved(x, c, s, p.pairs, out);
  } else {
    rotate_half(x, c, s, p.pairs, out);
  }
  if (x != out)
    for (int64_t i = 2 * p.pairs; i < n; ++i) out[i] = x[i];
}

/// `tokens` with head `h` of each as its row.
template <class T>
Rows head(const HeadRows& heads, int64_t h) {
  Rows rows = heads.tokens;
  rows.data = static_cast<T*>(rows.data) + h * heads.stride;
  return rows;
}

void rotate_token(const RopeParams& p, const HeadRows& x, const HeadRows& out, int64_t token,
                  const float* c, const float* s, float* buffer) {
  const int64_t n = x.tokens.n;
  by_float(x.tokens.dtype, [&](auto type) {
    using T = decltype(type);
    if (out.tokens.dtype == x.tokens.dtype && x.tokens.step == 1 && out.tokens.step == 1) {
      const T* from = static_cast<const T*>(x.tokens.data) + row_offset(x.tokens, token);
      T* to = static_cast<T*>(out.tokens.data) + row_offset(out.tokens, token);
      for (int64_t h = 0; h < x.count; ++h)
        rotate(p, from + h * x.stride, c, s, n, to + h * out.stride);
      return;
    }
    by_float(out.tokens.dtype, [&](auto out_type) {
      for (int64_t h = 0; h < x.count; ++h) {
        read_span(head<T>(x, h), token, 0, n, buffer);
        rotate(p, buffer, c, s, n, buffer);
        write_span(buffer, head<decltype(out_type)>(out, h), token, 0, n);
      }
    });
  });
}

}  // namespace

void rope(const RopeParams& p, int threads) {
  const int64_t tokens = p.x[0].tokens.count, n = p.x[0].tokens.n;
  const int64_t heads = p.x[0].count + p.x[1].count, each = 4 * p.pairs + n;
  float* scratch = scratch_floats(each * threads);
  const int64_t grain = 1 + kGrain / (heads * n + 1);
  parallel_for(tokens, grain, threads, [&](int t, int64_t begin, int64_t end) {
    float *c = scratch + each * t, *s = c + 2 * p.pairs, *buffer = s + 2 * p.pairs;
    for (int64_t token = begin; token < end; ++token) {
      read_tables(p, position_of(p, token), c, s);
      for (int i = 0; i < 2; ++i)
        if (p.x[i].tokens.data) rotate_token(p, p.x[i], p.out[i], token, c, s, buffer);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
