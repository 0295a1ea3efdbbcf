#include "attention/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

Heads heads(const Tensor& t) {
  Heads h{t.ptr<char>(), t.dtype, t.item_size()};
  for (int i = 0; i < 4; ++i) h.stride[i] = t.stride[i];
  return h;
}

/// Beginnings of packed sequences: i32, from 0 to `total`, never falling.
bool is_partition(const Tensor& cu_seqlens, int64_t total) {
  if (cu_seqlens.dtype != DType::i32 || cu_seqlens.ndim != 1 || !cu_seqlens.contiguous())
    return false;
  const int64_t n = cu_seqlens.dim(0);
  const auto* at = cu_seqlens.ptr<int32_t>();
  bool ok = n >= 1 && at[0] == 0 && at[n - 1] == total;
  for (int64_t i = 1; ok && i < n; ++i) ok = at[i] >= at[i - 1];
  return ok;
}

}  // namespace

void scaled_dot_product_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& cu_seqlens_q,
                                  const std::optional<Tensor>& cu_seqlens_k, const Tensor& out,
                                  double scale, bool causal, int64_t executor) {
  CHECK_TENSORS(query, key, value, mask, cu_seqlens_q, cu_seqlens_k, out);
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
  CHECK_CPU(query);
  CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), cu_seqlens_q, cu_seqlens_k);
  if (cu_seqlens_q) {
    CHECK(!mask && query.dim(0) == 1, mask, query);
    CHECK(is_partition(*cu_seqlens_q, query.dim(2)), cu_seqlens_q, query);
    CHECK(is_partition(*cu_seqlens_k, key.dim(2)), cu_seqlens_k, key);
    CHECK(cu_seqlens_q->dim(0) == cu_seqlens_k->dim(0), cu_seqlens_q, cu_seqlens_k);
  }
  if (out.numel() == 0) return;

  AttentionParams p{heads(query), heads(key), heads(value), heads(out)};
  if (mask) p.mask = heads(*mask);
  p.cu_seqlens_q = cu_seqlens_q ? cu_seqlens_q->ptr<int32_t>() : nullptr;
  p.cu_seqlens_k = cu_seqlens_k ? cu_seqlens_k->ptr<int32_t>() : nullptr;
  p.sequences = cu_seqlens_q ? cu_seqlens_q->dim(0) - 1 : query.dim(0);
  p.heads = query.dim(1);
  p.kv_heads = key.dim(1);
  p.queries = query.dim(2);
  p.keys = key.dim(2);
  p.width = query.dim(3);
  p.value_width = value.dim(3);
  p.scale = static_cast<float>(scale);
  p.softcap = 0.0f;
  p.bottom_right = false;
  p.left = int64_t{1} << 40;
  p.right = causal ? 0 : int64_t{1} << 40;
  RUN_CPU_KERNEL(attention, p, query, executor);
}

void bind_attention(py::module_& m) {
  m.def("scaled_dot_product_attention", &scaled_dot_product_attention, py::arg("query"),
        py::arg("key"), py::arg("value"), py::arg("mask"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"), py::arg("out"), py::arg("scale"), py::arg("causal"),
        py::arg("executor"), nogil());
}

}  // namespace warpformer
