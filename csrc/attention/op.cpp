#include "attention/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

bool is_per_head(const Tensor& t, const Tensor& query) {
  return t.dtype == DType::f32 && t.ndim == 1 && t.dim(0) == query.dim(1) && t.contiguous();
}
bool is_per_query(const Tensor& t, const Tensor& query) {
  return t.dtype == DType::f32 && t.ndim == 3 && t.dim(0) == query.dim(0) &&
         t.dim(1) == query.dim(1) && t.dim(2) == query.dim(2);
}

bool is_starts(const Tensor& t) {
  return t.dtype == DType::i32 && t.ndim == 1 && t.dim(0) >= 1 && t.contiguous();
}

/// What the forward takes and the backward takes again. Checked under the name of the op.
AttentionParams scaled_dot_product_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& position_bias, const std::optional<Tensor>& biases,
    const std::optional<Tensor>& seed, const Tensor& out, const std::optional<Tensor>& lse,
    double scale, double softcap, bool bottom_right, int64_t left, int64_t right,
    bool bidirectional, int64_t max_distance, double dropout_p) {
  CHECK_TENSORS(query, key, value, mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks,
                position_bias, biases, seed, out, lse);
  for (const Tensor& t : {query, key, value, out})
    CHECK(t.floating() && t.dtype == query.dtype && t.ndim == 4 && t.dim(0) == query.dim(0), query,
          key, value, out);
  CHECK(key.dim(1) == value.dim(1) && key.dim(2) == value.dim(2), key, value);
  CHECK(key.dim(3) == query.dim(3), query, key);
  CHECK(key.dim(1) > 0 && query.dim(1) % key.dim(1) == 0, query, key);
  CHECK(out.dim(1) == query.dim(1) && out.dim(2) == query.dim(2) && out.dim(3) == value.dim(3), out,
        query, value);
  if (mask)
    CHECK((mask->floating() || mask->dtype == DType::boolean) && mask->ndim == 4 &&
              mask->dim(0) == query.dim(0) && mask->dim(1) == query.dim(1) &&
              mask->dim(2) == query.dim(2) && mask->dim(3) == key.dim(2),
          mask, query, key);
  if (alibi_slopes) CHECK(is_per_head(*alibi_slopes, query), alibi_slopes, query);
  if (sinks) CHECK(is_per_head(*sinks, query), sinks, query);
  if (lse) CHECK(is_per_query(*lse, query), lse, query);
  CHECK(softcap >= 0.0, softcap);
  CHECK(left >= 0 && right >= 0, left, right);
  if (position_bias) {
    CHECK(position_bias->floating() && position_bias->ndim == 2 &&
              position_bias->dim(1) == query.dim(1),
          position_bias, query);
    const int64_t buckets = position_bias->dim(0) / (bidirectional ? 2 : 1);
    CHECK(buckets >= 2 && max_distance > buckets / 2, position_bias, bidirectional, max_distance);
  }
  CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, dropout_p);
  if (dropout_p > 0.0)
    CHECK(seed && seed->dtype == DType::i64 && seed->numel() == 1, seed, dropout_p);
  CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), cu_seqlens_q, cu_seqlens_k);
  if (cu_seqlens_q) {
    CHECK(!mask && query.dim(0) == 1, mask, query);
    CHECK(is_starts(*cu_seqlens_q), cu_seqlens_q);
    CHECK(is_starts(*cu_seqlens_k), cu_seqlens_k);
    if (runs_on_cpu(query)) {
      CHECK(is_partition(*cu_seqlens_q, query.dim(2)), cu_seqlens_q, query);
      CHECK(is_partition(*cu_seqlens_k, key.dim(2)), cu_seqlens_k, key);
    }
    CHECK(cu_seqlens_q->dim(0) == cu_seqlens_k->dim(0), cu_seqlens_q, cu_seqlens_k);
  }

  AttentionParams p{heads(query), heads(key), heads(value), heads(out)};
  if (mask) p.mask = heads(*mask);
  if (lse) p.lse = heads(*lse);
  if (cu_seqlens_q) p.cu_seqlens_q = cu_seqlens_q->ptr<int32_t>();
  if (cu_seqlens_k) p.cu_seqlens_k = cu_seqlens_k->ptr<int32_t>();
  if (alibi_slopes) p.slopes = alibi_slopes->ptr<float>();
  if (sinks) p.sinks = sinks->ptr<float>();
  if (position_bias) p.position_bias = {rows(*position_bias), bidirectional, max_distance};
  if (position_bias && !runs_on_cpu(query)) CHECK(biases, biases, position_bias);
  if (biases) {
    CHECK(biases->dtype == DType::i32 && biases->ndim == 2 && biases->dim(0) == query.dim(1) &&
              biases->dim(1) % 2 == 1 && biases->contiguous(),
          biases, query);
    p.biases = biases->ptr<float>();
    p.reach = biases->dim(1) / 2;
  }
  if (dropout_p > 0.0)
    p.dropout = {seed->ptr<int64_t>(), static_cast<uint64_t>(dropout_p * 0x1p32),
                 dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f};
  p.sequences = cu_seqlens_q ? cu_seqlens_q->dim(0) - 1 : query.dim(0);
  p.heads = query.dim(1);
  p.kv_heads = key.dim(1);
  p.queries = query.dim(2);
  p.keys = key.dim(2);
  p.width = query.dim(3);
  p.value_width = value.dim(3);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.bottom_right = bottom_right;
  p.left = left;
  p.right = right;
  return p;
}

}  // namespace

void scaled_dot_product_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& position_bias, const std::optional<Tensor>& biases,
    const std::optional<Tensor>& seed, const Tensor& out, const std::optional<Tensor>& lse,
    double scale, double softcap, bool bottom_right, int64_t left, int64_t right,
    bool bidirectional, int64_t max_distance, double dropout_p, int64_t executor) {
  const AttentionParams p = scaled_dot_product_attention(
      query, key, value, mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, position_bias,
      biases, seed, out, lse, scale, softcap, bottom_right, left, right, bidirectional,
      max_distance, dropout_p);
  if (query.dim(0) * query.dim(1) * query.dim(2) == 0) return;
  RUN_KERNEL(attention, p, query, executor);
}

void scaled_dot_product_attention_backward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& position_bias, const std::optional<Tensor>& biases,
    const std::optional<Tensor>& seed, const Tensor& out, const Tensor& lse, double scale,
    double softcap, bool bottom_right, int64_t left, int64_t right, bool bidirectional,
    int64_t max_distance, double dropout_p, const Tensor& dout, const std::optional<Tensor>& dlse,
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const std::optional<Tensor>& dmask,
    const Tensor& delta, const std::optional<Tensor>& dposition_bias,
    const std::optional<Tensor>& parts, int64_t executor) {
  AttentionBackwardParams p{scaled_dot_product_attention(
      query, key, value, mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, position_bias,
      biases, seed, out, lse, scale, softcap, bottom_right, left, right, bidirectional,
      max_distance, dropout_p)};
  CHECK_TENSORS(query, dout, dlse, dq, dk, dv, dmask, delta, dposition_bias, parts);
  CHECK(dout.dtype == query.dtype && dout.same_shape(out), dout, out);
  if (dlse) CHECK(is_per_query(*dlse, query), dlse, query);
  CHECK(dq.dtype == DType::f32 && dq.same_shape(query) && dq.contiguous(), dq, query);
  CHECK(dk.dtype == key.dtype && dk.same_shape(key), dk, key);
  CHECK(dv.dtype == value.dtype && dv.same_shape(value), dv, value);
  if (dmask) CHECK(mask && dmask->dtype == DType::f32 && dmask->same_shape(*mask), dmask, mask);
  CHECK(is_per_query(delta, query) && delta.contiguous(), delta, query);
  if (dposition_bias)
    CHECK(position_bias && dposition_bias->dtype == DType::f32 &&
              dposition_bias->same_shape(*position_bias) && dposition_bias->contiguous(),
          dposition_bias, position_bias);
  if (dposition_bias && !runs_on_cpu(query)) {
    // Tiles of 64 queries of each head, and one more where a packed sequence begins.
    const int64_t tiles = query.dim(2) / 64 + (cu_seqlens_q ? cu_seqlens_q->dim(0) : 1);
    CHECK(parts && parts->dtype == DType::f32 && parts->contiguous() &&
              parts->numel() >= query.dim(0) * query.dim(1) * tiles * dposition_bias->dim(0),
          parts, query, dposition_bias);
  }
  if (key.dim(0) * key.dim(1) == 0) return;

  p.dout = heads(dout);
  if (dlse) p.dlse = heads(*dlse);
  p.dk = heads(dk);
  p.dv = heads(dv);
  if (dmask) p.dmask = heads(*dmask);
  p.dq = dq.ptr<float>();
  p.delta = delta.ptr<float>();
  p.dposition_bias = dposition_bias ? dposition_bias->ptr<float>() : nullptr;
  p.parts = parts ? parts->ptr<float>() : nullptr;
  RUN_KERNEL(attention_backward, p, query, executor);
}

void bind_attention(py::module_& m) {
  using Forward = void (*)(
      const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
      const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
      const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
      const std::optional<Tensor>&, const Tensor&, const std::optional<Tensor>&, double, double,
      bool, int64_t, int64_t, bool, int64_t, double, int64_t);
  m.def("scaled_dot_product_attention", op(static_cast<Forward>(&scaled_dot_product_attention)),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("alibi_slopes"), py::arg("sinks"),
        py::arg("position_bias"), py::arg("biases"), py::arg("seed"), py::arg("out"),
        py::arg("lse"), py::arg("scale"), py::arg("softcap"), py::arg("bottom_right"),
        py::arg("left"), py::arg("right"), py::arg("position_bidirectional"),
        py::arg("position_max_distance"), py::arg("dropout_p"), py::arg("executor"), nogil());
  m.def("scaled_dot_product_attention_backward", &scaled_dot_product_attention_backward,
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("alibi_slopes"), py::arg("sinks"),
        py::arg("position_bias"), py::arg("biases"), py::arg("seed"), py::arg("out"),
        py::arg("lse"), py::arg("scale"), py::arg("softcap"), py::arg("bottom_right"),
        py::arg("left"), py::arg("right"), py::arg("position_bidirectional"),
        py::arg("position_max_distance"), py::arg("dropout_p"), py::arg("dout"), py::arg("dlse"),
        py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dmask"), py::arg("delta"),
        py::arg("dposition_bias"), py::arg("parts"), py::arg("executor"), nogil());
}

}  // namespace warpformer
