#include "rope/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

using Optional = std::optional<Tensor>;

/// `t` without dimension `dim`.
Tensor without(Tensor t, int dim) {
  --t.ndim;
  for (int i = dim; i < t.ndim; ++i) {
    t.shape[i] = t.shape[i + 1];
    t.stride[i] = t.stride[i + 1];
  }
  return t;
}

HeadRows heads(const Tensor& t) {
  const int dim = t.ndim - 2;
  return {rows(without(t, dim)), t.shape[dim], t.stride[dim]};
}

bool same_tokens(const Tensor& a, const Tensor& b) {
  bool same = a.ndim == b.ndim;
  for (int i = 0; same && i + 2 < a.ndim; ++i) same = a.dim(i) == b.dim(i);
  return same;
}

bool is_index_of(const Tensor& positions, const Tensor& x) {
  bool fits = positions.dtype == DType::i64 || positions.dtype == DType::i32;
  fits = fits && positions.ndim == x.ndim - 2;
  for (int i = 0; fits && i < positions.ndim; ++i) fits = positions.dim(i) == x.dim(i);
  return fits;
}

void check_range(const char* op, const Tensor& positions, const Tensor& cos) {
  const int64_t n = positions.numel();
  for (int64_t i = 0; i < n; ++i) {
    int64_t offset = 0, rest = i;
    for (int d = positions.ndim - 1; d >= 0; --d) {
      offset += rest % positions.shape[d] * positions.stride[d];
      rest /= positions.shape[d];
    }
    const int64_t position = positions.dtype == DType::i64 ? positions.ptr<int64_t>()[offset]
                                                           : positions.ptr<int32_t>()[offset];
    if (position < 0 || position >= cos.dim(0))
      fail(op, "0 <= position < cos.dim(0)", "position, cos", position, cos);
  }
}

}  // namespace

void rope(const Tensor& x, const Optional& key, const Tensor& cos, const Tensor& sin,
          const Optional& positions, bool interleaved, bool conjugate, const Tensor& out,
          const Optional& key_out, int64_t executor) {
  CHECK_TENSORS(x, key, cos, sin, positions, out, key_out);
  CHECK(x.floating() && x.ndim >= 3, x);
  CHECK(out.floating() && out.same_shape(x), out, x);
  CHECK(key.has_value() == key_out.has_value(), key, key_out);
  if (key) {
    CHECK(key->floating() && same_tokens(*key, x) && key->dim(-1) == x.dim(-1), key, x);
    CHECK(key_out->floating() && key_out->same_shape(*key), key_out, key);
  }
  for (const Tensor& table : {cos, sin})
    CHECK(table.dtype == DType::f32 && table.ndim == 2 && table.contiguous(), cos, sin);
  CHECK(sin.same_shape(cos), cos, sin);
  CHECK(2 * cos.dim(1) <= x.dim(-1), cos, x);
  if (positions) {
    CHECK(is_index_of(*positions, x), positions, x);
  } else {
    CHECK(x.dim(-3) <= cos.dim(0), cos, x);
  }
  if (without(x, x.ndim - 2).numel() == 0) return;
  if (positions && runs_on_cpu(x)) check_range(__func__, *positions, cos);

  RopeParams p{{heads(x)}, {heads(out)}, cos.ptr<float>(), sin.ptr<float>()};
  if (key) {
    p.x[1] = heads(*key);
    p.out[1] = heads(*key_out);
  }
  if (positions) p.positions = elements(*positions);
  p.table_rows = cos.dim(0);
  p.pairs = cos.dim(1);
  p.length = x.dim(-3);
  p.interleaved = interleaved;
  p.conjugate = conjugate;
  RUN_KERNEL(rope, p, x, executor);
}

void bind_rope(py::module_& m) {
  m.def("rope", op(&rope), py::arg("x"), py::arg("key"), py::arg("cos"), py::arg("sin"),
        py::arg("positions"), py::arg("interleaved"), py::arg("conjugate"), py::arg("out"),
        py::arg("key_out"), py::arg("executor"), nogil());
}

}  // namespace warpformer
