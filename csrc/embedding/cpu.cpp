// rows of the tables --sum--> out row; rows that are not contiguous floats pass through a buffer of
// floats
//
// Backward, runs of equal indices and blocks of columns are shared out among the threads:
//   rows of grad of one run --sum, in their order--> dtable row
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
        const int64_t index = static_cast<const int64_t*>(p.index[i].data)[r];
        const float* row = row_in(p.table[i], index, term);
        for_lanes(n, [&](int64_t j, auto k) {
          store(out + j, i ? load(out + j, k) + load(row + j, k) : load(row + j, k), k);
        });
      }
      finish_row(p.out, r, out);
    }
  });
}

namespace {

constexpr int64_t kBlock = 256;  // columns

/// dtable[index[i]], columns [first, first + n), from the run of equal indices that begins at i: in
/// blocks of rows, because a long chain of additions rounds more. Returns the end of the run.
int64_t add_run(const EmbeddingSumBackwardParams& p, int64_t i, int64_t first, int64_t n) {
  constexpr int kRows = 16;
  float total[kBlock], block[kBlock], term[kBlock];
  const int64_t begin = i, row = p.index[i], count = p.grad.count;
  const auto add = [&](float* to, const float* what) {
    for_lanes(n, [&](int64_t j, auto k) { store(to + j, load(to + j, k) + load(what + j, k), k); });
  };
  while (i < count && p.index[i] == row) {
    float* sum = i == begin ? total : block;
    read_span(p.grad, p.order[i], first, n, sum);
    const int64_t end = i + kRows < count ? i + kRows : count;
    for (++i; i < end && p.index[i] == row; ++i) {
      read_span(p.grad, p.order[i], first, n, term);
      add(sum, term);
    }
    if (sum == block) add(total, block);
  }
  if (row != p.padding) write_span(total, p.dtable, row, first, n);
  return i;
}

}  // namespace

void embedding_sum_backward(const EmbeddingSumBackwardParams& p, int threads) {
  const int64_t n = p.grad.count, columns = p.grad.n, blocks = (columns + kBlock - 1) / kBlock;
  parallel_for(blocks * n, 1 + 32768 / columns, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t block = begin / n; block * n < end; ++block) {
      const int64_t first = block * kBlock;
      const int64_t width = columns - first < kBlock ? columns - first : kBlock;
      const int64_t last = end - block * n < n ? end - block * n : n;
      int64_t i = begin > block * n ? begin - block * n : 0;
      // A run belongs to whom it begins with.
      while (i > 0 && i < last && p.index[i] == p.index[i - 1]) ++i;
      while (i < last) i = add_run(p, i, first, width);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
