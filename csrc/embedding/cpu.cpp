// rows of the tables --> sum in a buffer of floats --> out row
#include "core/dispatch.h"
#include "core/parallel.h"
#include "embedding/op.h"

namespace warpformer::cpu::WF_ISA {

void embedding_sum(const EmbeddingSumParams& p) {
  const int64_t n = p.out.n;
  parallel_for(p.out.count, 1 + 32768 / n, p.threads, [&](int t, int64_t begin, int64_t end) {
    float* total = p.scratch + 2 * n * t;
    float* term = total + n;
    for (int64_t r = begin; r < end; ++r) {
      for (int i = 0; i < p.tables; ++i) {
        by_float(p.table[i].dtype, [&](auto type) {
          read_row<decltype(type)>(p.table[i], p.index[i][r], i ? term : total);
        });
        if (i == 0) continue;
        for_lanes(n, [&](int64_t j, auto k) {
          store(total + j, load(total + j, k) + load(term + j, k), k);
        });
      }
      by_float(p.out.dtype, [&](auto type) { write_row<decltype(type)>(total, p.out, r); });
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
