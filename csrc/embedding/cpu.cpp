// rows of the tables --sum--> out row; rows that are not contiguous floats pass through a buffer of
// floats
#include "core/parallel.h"
#include "core/scratch.h"
#include "embedding/op.h"

namespace warpformer::cpu::WF_ISA {

void embedding_sum(const EmbeddingSumParams& p, int threads) {
  const int64_t n = p.out.n;
  float* scratch = scratch_floats(2 * n * threads);
  parallel_for(p.out.count, 1 + 32768 / n, threads, [&](int t, int64_t begin, int64_t end) {
    float* total = scratch + 2 * n * t;
    float* term = total + n;
    for (int64_t r = begin; r < end; ++r) {
      float* out = row_out(p.out, r, total);
      for (int i = 0; i < p.tables; ++i) {
        const float* row = row_in(p.table[i], p.index[i][r], term);
        for_lanes(n, [&](int64_t j, auto k) {
          store(out + j, i ? load(out + j, k) + load(row + j, k) : load(row + j, k), k);
        });
      }
      finish_row(p.out, r, out);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
