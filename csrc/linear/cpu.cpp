// linear: which words and sums the format of the weight asks for (op.h); the product itself is in
// product.h.
#include "linear/product.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// Words of a packed weight: its own, or unpacked ones.
struct Packed {
  const Weight& w;

  int64_t depth() const { return w.depth; }
  int64_t panels() const { return w.panels; }
  bool has_zeros() const { return w.zeros; }
  bool has_factors() const { return w.factors; }
  template <class Word>
  bool is_stored() const {
    return warpformer::cpu::WF_ISA::is_stored<Word>(w.format);
  }

  template <class Word>
  Panels words(int64_t panel, int64_t count, int64_t first, int64_t n, float* scratch, Word) const {
    if (is_stored<Word>()) {
      const auto* words = reinterpret_cast<const float*>(w.data + panel * w.size);
      return {words + first * kPanel, w.size / 4, kPanel};
    }
    const int64_t rows = (n + 7) / 8 * 8;
    for (int64_t p = 0; p < count; ++p)
      unpack(w, w.data + (panel + p) * w.size, first * kPerWord<Word>, n * kPerWord<Word>,
             scratch + p * rows * kPanel, Word{});
    return {scratch, rows * kPanel, kPanel};
  }
};

template <class Word, int kParts, Kind kKind>
void run(const LinearParams& p, int threads) {
  Product<Word, kParts, kKind, Packed>(p, {p.weight}).run(threads);
}

template <class Word, int kParts>
void run_exact(const LinearParams& p, int threads) {
  p.weight.groups ? run<Word, kParts, Kind::grouped>(p, threads)
                  : run<Word, kParts, Kind::plain>(p, threads);
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  const Format format = p.weight.format;
  if (format == Format::int8_dynamic) return run<DynamicWord, 1, Kind::tokens>(p, threads);
  if (format == Format::int4_dynamic) return run<DynamicWord, 1, Kind::blocks>(p, threads);
#if defined(__AVX512BF16__)
  const bool half = p.x.dtype == DType::bf16, codes = format == Format::int8 || format == Format::int4;
  if (half && format == Format::bf16) return run<Pair, 1, Kind::plain>(p, threads);
  if (codes) return half ? run_exact<Pair, 1>(p, threads) : run_exact<Pair, 2>(p, threads);
#endif
  run_exact<float, 1>(p, threads);
}

}  // namespace warpformer::cpu::WF_ISA
