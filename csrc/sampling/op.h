// sample, of a row of scores x, with z = x / temperature:
//   kept     after each other, where an option asks for it, of what the ones before have left:
//     top_k      z of the k greatest, and what equals the last of them
//     top_p      the fewest of the greatest whose probabilities reach top_p together
//     min_p      exp(z - max z) >= min_p
//     typical_p  the fewest whose |-log p - entropy| is smallest and whose probabilities reach
//                typical_p together, and what equals the last of them
//   out      the first v with sum of exp(z - max z) over kept tokens 0..v > u times that over all;
//            of temperature 0 the first of the greatest x
//
//   x        [R, V], f32 f16 bf16, any strides
//   options  [R, 5], any strides: temperature, top_k, top_p, min_p, typical_p of each row. Bits of
//            doubles in i64, because the library has no f64. 0, 1, 0 and 1 of the last four: none
//   draws    [R]: u, from 0 to below 1; bits of doubles too. None: temperature is 0 everywhere
//   tokens, first_new, penalties   of penalize, by which x is changed before all else; or none
//   scratch  [R, V], f32, any strides: where it is, if they are given
//   out      [R], i64, contiguous; -1 where no x is finite or one is NaN or +inf: that is refused
//
// Exponentials are float. Their sums are double, of 64 tokens and then of those sums; on CUDA they
// are whole numbers of 2^-40, for which a row has less than 2^24 tokens.
//
// penalize: out[v] = x / r where x >= 0, else r x, of the tokens v of a row; then less f n and, if
// n > 0, less p, where v is n times among the tokens from first_new[row] on. Others: out[v] = x.
//
//   x, out     [R, V], f32 f16 bf16 each, any strides; out may be x
//   tokens     [R, T], i64, any strides; what is not 0..V - 1 does not count
//   first_new  [R], i64
//   penalties  [R, 3], f32, any strides: r, f, p of each row
//
// top_k: the k greatest of each row, the greatest first and of equal ones the first first; NaN is
// greater than all.
//
//   x       [R, V], f32 f16 bf16, any strides; 1 <= k <= V
//   values  [R, k], f32, contiguous       indices  [R, k], i64, contiguous
//   log_softmax: the values are x - log sum exp(x), with the bits of the op of this name
//
// Source: Holtzman et al., "The Curious Case of Neural Text Degeneration"; Nguyen et al., "Turning
// Up the Heat"; Meister et al., "Locally Typical Sampling"; Keskar et al., "CTRL".
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct SamplingOptions {
  double temperature, top_k, top_p, min_p, typical_p;
};
constexpr int kSamplingOptions = 5;

struct PenalizeParams {
  Rows x, out;
  const int64_t* tokens;
  int64_t token_count, token_stride[2];
  const int64_t* first_new;
  int64_t first_stride;
  const float* penalties;
  int64_t penalty_stride[2];
};
DECLARE_KERNEL(penalize, PenalizeParams)

struct SampleParams {
  Rows x;
  const double* options;
  int64_t option_stride[2];
  const double* draws;  // null: none
  int64_t draw_stride;
  PenalizeParams penalties;  // of the same x, whose `out` is drawn from; x.data is null: none
  int64_t* out;

  SamplingOptions of(int64_t row) const {
    const double* o = options + row * option_stride[0];
    const int64_t step = option_stride[1];
    return {draws ? o[0] : 0.0, o[step], o[2 * step], o[3 * step], o[4 * step]};
  }
};
DECLARE_KERNEL(sample, SampleParams)

struct TopKParams {
  Rows x;
  int64_t k;
  bool log_softmax;
  float* values;
  int64_t* indices;
};
DECLARE_KERNEL(top_k, TopKParams)

}  // namespace warpformer
