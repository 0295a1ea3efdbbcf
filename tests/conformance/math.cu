// Functions and conversions of one number a thread; pairs where they take two.
#include "conformance/case.h"

namespace warpformer::cuda {
namespace {

template <class T, class U, class F>
KERNEL(128)
map(const T* in, U* out, int64_t count, F f) {
  const int64_t i = block_index() * block_threads() + thread_index();
  if (i < count) store(out + i, f(in, i));
}
template <class T, class U, class F>
void run_map(const conformance::Call& call, F f) {
  const int64_t count = call.result_bytes / static_cast<int64_t>(sizeof(U));
  LAUNCH((map<T, U, F>), (count + 127) / 128, 128, 0, call.stream, call.input<T>(0),
         call.output<U>(), count, f);
}

#define MATH_CASE(name, T, U, expression)               \
  struct Map_##name {                                   \
    DEVICE U operator()(const T* in, int64_t i) const { \
      const T x = load(in + i);                         \
      return expression;                                \
    }                                                   \
  };                                                    \
  CASE(name) { run_map<T, U>(call, Map_##name{}); }
#define BINARY_CASE(name, U, expression)                          \
  struct Map_##name {                                             \
    DEVICE U operator()(const float* in, int64_t i) const {       \
      const float x = load(in + 2 * i), y = load(in + 2 * i + 1); \
      return expression;                                          \
    }                                                             \
  };                                                              \
  CASE(name) { run_map<float, U>(call, Map_##name{}); }

MATH_CASE(exp2_approx, float, float, exp2_approx(x))
MATH_CASE(log2_approx, float, float, log2_approx(x))
MATH_CASE(rcp_approx, float, float, rcp_approx(x))
MATH_CASE(rsqrt_approx, float, float, rsqrt_approx(x))
MATH_CASE(tanh_approx, float, float, tanh_approx(x))
MATH_CASE(exp, float, float, exp(x))
MATH_CASE(log, float, float, log(x))
MATH_CASE(log1p, float, float, log1p(x))
MATH_CASE(erf, float, float, erf(x))
MATH_CASE(tanh, float, float, tanh(x))
MATH_CASE(sqrt, float, float, sqrt(x))
MATH_CASE(rsqrt, float, float, rsqrt(x))
MATH_CASE(abs, float, float, abs(x))
BINARY_CASE(max, float, max(x, y))
BINARY_CASE(min, float, min(x, y))
BINARY_CASE(fma, float, fma(x, y, x))

MATH_CASE(bf16_to_float, bf16, float, to_float(x))
MATH_CASE(f16_to_float, f16, float, to_float(x))
MATH_CASE(float_to_bf16, float, bf16, from_float<bf16>(x))
MATH_CASE(float_to_f16, float, f16, from_float<f16>(x))
MATH_CASE(float_to_tf32, float, uint32_t, to_tf32(x))
BINARY_CASE(pack_bf16, uint32_t, pack2<bf16>(x, y))
BINARY_CASE(pack_f16, uint32_t, pack2<f16>(x, y))

template <class T>
struct Unpack {
  DEVICE float operator()(const uint32_t* in, int64_t i) const {
    float low, high;
    unpack2<T>(load(in + i), low, high);
    return low + 2 * high;
  }
};
template <class T>
struct Add {
  DEVICE uint32_t operator()(const uint32_t* in, int64_t i) const {
    return add2<T>(load(in + 2 * i), load(in + 2 * i + 1));
  }
};
CASE(add_bf16) { run_map<uint32_t, uint32_t>(call, Add<bf16>{}); }
CASE(add_f16) { run_map<uint32_t, uint32_t>(call, Add<f16>{}); }
CASE(unpack_bf16) { run_map<uint32_t, float>(call, Unpack<bf16>{}); }
CASE(unpack_f16) { run_map<uint32_t, float>(call, Unpack<f16>{}); }

}  // namespace
}  // namespace warpformer::cuda
