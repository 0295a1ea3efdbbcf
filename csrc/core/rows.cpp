#include "core/rows.h"

#include <algorithm>

#include "core/tensor.h"

namespace warpformer {

Rows rows(const Tensor& t, int dim) {
  if (dim < 0) dim += t.ndim;
  Rows r;
  r.data = t.data;
  r.dtype = t.dtype;
  r.n = t.shape[dim];
  r.step = t.stride[dim];
  r.count = 1;
  for (int i = 0; i < t.ndim; ++i) {
    if (i == dim) continue;
    r.count *= t.shape[i];
    if (t.shape[i] == 1) continue;
    const bool joins = r.ndim > 0 && r.stride[r.ndim - 1] == t.shape[i] * t.stride[i];
    const int at = joins ? r.ndim - 1 : r.ndim++;
    r.shape[at] = (joins ? r.shape[at] : 1) * t.shape[i];
    r.stride[at] = t.stride[i];
  }
  return r;
}

Rows elements(const Tensor& t) {
  Tensor with_dim = t;
  with_dim.shape[t.ndim] = with_dim.stride[t.ndim] = 1;
  ++with_dim.ndim;
  return rows(with_dim);
}

Rows flat(const Tensor& t) {
  Rows r{t.data, t.dtype, t.numel()};
  r.step = r.count = 1;
  return r;
}

int64_t common_run(const Rows& a, const Rows& b) {
  const auto run = [](const Rows& rows) {
    return rows.ndim ? rows.shape[rows.ndim - 1] : rows.count;
  };
  return std::min(run(a), run(b));
}

}  // namespace warpformer
