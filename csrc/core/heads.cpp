#include "core/heads.h"

#include "core/tensor.h"

namespace warpformer {

Heads heads(const Tensor& t) {
  Heads h{t.ptr<char>(), t.dtype, t.item_size()};
  for (int i = 0; i < t.ndim; ++i) h.stride[i] = t.stride[i];
  return h;
}

bool is_partition(const Tensor& cu_seqlens, int64_t total) {
  if (cu_seqlens.dtype != DType::i32 || cu_seqlens.ndim != 1 || !cu_seqlens.contiguous())
    return false;
  const int64_t n = cu_seqlens.dim(0);
  const auto* at = cu_seqlens.ptr<int32_t>();
  bool ok = n >= 1 && at[0] == 0 && at[n - 1] == total;
  for (int64_t i = 1; ok && i < n; ++i) ok = at[i] >= at[i - 1];
  return ok;
}

}  // namespace warpformer
