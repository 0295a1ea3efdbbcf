#include "core/heads.h"

#include "core/tensor.h"

namespace warpformer {

Heads heads(const Tensor& t) {
  Heads h{t.ptr<char>(), t.dtype, t.item_size()};
  for (int i = 0; i < t.ndim; ++i) h.stride[i] = t.stride[i];
  return h;
}

}  // namespace warpformer
