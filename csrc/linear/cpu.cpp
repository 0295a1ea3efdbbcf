// linear: which words and sums the format of the weight asks for (op.h); the product itself is in
// product.h.
#include "linear/product.h"

namespace warpformer::cpu::WF_ISA {
namespace {

template <Kind kKind>
struct Packed {
  static constexpr bool kIsPacked = true;
  const Weight& w;

  int64_t depth() const { return w.depth; }
  int64_t panels() const { return w.panels; }
  bool has_zeros() const { return w.zeros; }
  bool has_factors() const { return w.factors; }
  template <class Word>
  int64_t length() const {
    return words_of<Word>(w.format, w.depth);
  }

  /// Where in a panel a word lies.
  template <class Word>
  int64_t place(int64_t word) const {
    return values_at(w, word * kPerWord<Word>);
  }

  template <class Word, class F>
  void words(int64_t panel, int64_t count, int64_t first, int64_t n, bool few, float* scratch, Word,
             const F& f) const {
    with_values<kKind>(w, w.data + panel * w.size, first, Word{}, [&](auto b) {
      // A single fetch of a word is worth unpacking in advance, unless nothing has to be unpacked.
      constexpr bool kWords = __is_same(decltype(b), Words);
      if constexpr (kWords || decltype(b)::kWords > 1 || !__is_same(Word, float))
        if (few) return f(b);
      if constexpr (kWords) return f(Panels{b.template at<float>(0, 0, 0), w.size / 4, kPanel});
      const int64_t part = w.groups ? 2 * w.group / kPerWord<Word> : n;
      for (int64_t k = 0; k < n; k += part, b.skip_scales(1))
        for (int64_t p = 0; p < count; ++p)
          unpack(b, p, k, at_most(n, k + part), scratch + (p * kDepth + k) * kPanel);
      f(Panels{scratch, kDepth * kPanel, kPanel});
    });
  }
};

template <class Word, int kParts, Kind kKind>
void run(const LinearParams& p, int threads) {
  Product<Word, kParts, kKind, Packed<kKind>>(p, {p.weight}).run(threads);
}

template <class Word, int kParts>
void run_exact(const LinearParams& p, int threads) {
  p.weight.groups ? run<Word, kParts, Kind::grouped>(p, threads)
                  : run<Word, kParts, Kind::plain>(p, threads);
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  const Format format = p.weight.format;
  if (format == Format::int8_dynamic) return run<TokenWord, 1, Kind::tokens>(p, threads);
  if (format == Format::int4_dynamic) return run<BlockWord, 1, Kind::blocks>(p, threads);
#if defined(__AVX512BF16__)
  const bool half = p.x.dtype == DType::bf16;
  if (half && format == Format::bf16) return run<Pair, 1, Kind::plain>(p, threads);
  if (half && format >= Format::int8) return run_exact<Pair, 1>(p, threads);
  if (format == Format::int8 || format == Format::int4) return run_exact<Pair, 2>(p, threads);
#endif
  run_exact<float, 1>(p, threads);
}

}  // namespace warpformer::cpu::WF_ISA
