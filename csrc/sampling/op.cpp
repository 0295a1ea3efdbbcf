#include "sampling/op.h"

#include <cmath>
#include <string>

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

using Optional = std::optional<Tensor>;

bool is_probability(double p) { return p >= 0 && p <= 1; }

void check_options(const SampleParams& p, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto [temperature, top_k, top_p, min_p, typical_p] = p.of(r);
    CHECK_FOR("sample", temperature >= 0 && temperature < HUGE_VAL, temperature);
    CHECK_FOR("sample", top_k >= 0 && top_k == std::floor(top_k), top_k);
    CHECK_FOR("sample", top_p > 0 && top_p <= 1, top_p);
    CHECK_FOR("sample", is_probability(min_p), min_p);
    CHECK_FOR("sample", typical_p > 0 && typical_p <= 1, typical_p);
    const double u = p.draws ? p.draws[r * p.draw_stride] : 0.0;
    CHECK_FOR("sample", u >= 0 && u < 1, u);
  }
}

/// Refuses rows without a token, the first few by number.
void check_tokens(const int64_t* tokens, int64_t rows) {
  std::string without;
  int named = 0;
  for (int64_t r = 0; r < rows && named < 8; ++r)
    if (tokens[r] < 0) without += (named++ ? ", " : "") + std::to_string(r);
  if (named)
    throw InputError("sample: there is no token to rows [" + without +
                     "]: none of their scores is finite, or one is NaN or +inf");
}

bool is_per_row(const Tensor& t, DType dtype, const Tensor& x, int64_t columns) {
  return t.dtype == dtype && t.ndim == 2 && t.dim(0) == x.dim(0) && t.dim(1) == columns;
}
bool is_per_row(const Optional& t, const Tensor& x) {
  return !t || (t->dtype == DType::i64 && t->ndim == 1 && t->dim(0) == x.dim(0));
}

PenalizeParams penalize_params(const Tensor& scores, const Tensor& tokens, const Tensor& first_new,
                               const Tensor& penalties, const Tensor& out) {
  PenalizeParams p{rows(scores), rows(out)};
  p.tokens = tokens.ptr<int64_t>();
  p.token_count = tokens.dim(1);
  p.token_stride[0] = tokens.stride[0];
  p.token_stride[1] = tokens.stride[1];
  p.first_new = first_new.ptr<int64_t>();
  p.first_stride = first_new.stride[0];
  p.penalties = penalties.ptr<float>();
  p.penalty_stride[0] = penalties.stride[0];
  p.penalty_stride[1] = penalties.stride[1];
  return p;
}

}  // namespace

void sample(const Tensor& scores, const Optional& draws, const Tensor& options,
            const Optional& tokens, const Optional& first_new, const Optional& penalties,
            const Optional& scratch, const Tensor& out, int64_t executor) {
  CHECK_TENSORS(scores, draws, options, tokens, first_new, penalties, scratch, out);
  CHECK(scores.floating() && scores.ndim == 2, scores);
  CHECK(is_per_row(options, DType::i64, scores, kSamplingOptions), options, scores);
  CHECK(is_per_row(draws, scores), draws, scores);
  CHECK(tokens.has_value() == first_new.has_value(), tokens, first_new);
  if (tokens) {
    CHECK(is_per_row(*tokens, DType::i64, scores, tokens->dim(1)), tokens, scores);
    CHECK(is_per_row(first_new, scores), first_new, scores);
    CHECK(is_per_row(*penalties, DType::f32, scores, 3), penalties, scores);
    CHECK(scratch->dtype == DType::f32 && scratch->same_shape(scores), scratch, scores);
  }
  CHECK(is_per_row(out, scores) && out.contiguous(), out, scores);
  const int64_t count = scores.dim(0);
  if (count == 0) return;
  CHECK(scores.dim(1) > 0 && (runs_on_cpu(scores) || scores.dim(1) < 1 << 24), scores);

  SampleParams p{rows(scores)};
  p.options = options.ptr<double>();
  p.option_stride[0] = options.stride[0];
  p.option_stride[1] = options.stride[1];
  p.draws = draws ? draws->ptr<double>() : nullptr;
  p.draw_stride = draws ? draws->stride[0] : 0;
  p.out = out.ptr<int64_t>();
  if (tokens) p.penalties = penalize_params(scores, *tokens, *first_new, *penalties, *scratch);
  if (runs_on_cpu(scores)) check_options(p, count);
  RUN_KERNEL(sample, p, scores, executor);
  if (runs_on_cpu(scores)) check_tokens(p.out, count);
}

void top_k(const Tensor& scores, int64_t k, bool log_softmax, const Tensor& values,
           const Tensor& indices, int64_t executor) {
  CHECK_TENSORS(scores, values, indices);
  CHECK(scores.floating() && scores.ndim == 2, scores);
  CHECK_FOR("top_k", k >= 1 && k <= scores.dim(1), k, scores);
  CHECK(is_per_row(values, DType::f32, scores, k) && values.contiguous(), values, scores);
  CHECK(is_per_row(indices, DType::i64, scores, k) && indices.contiguous(), indices, scores);
  if (scores.dim(0) == 0) return;

  TopKParams p{rows(scores), k, log_softmax, values.ptr<float>(), indices.ptr<int64_t>()};
  RUN_KERNEL(top_k, p, scores, executor);
}

void penalize(const Tensor& scores, const Tensor& tokens, const Tensor& first_new,
              const Tensor& penalties, const Tensor& out, int64_t executor) {
  CHECK_TENSORS(scores, tokens, first_new, penalties, out);
  CHECK(scores.floating() && scores.ndim == 2, scores);
  CHECK(is_per_row(tokens, DType::i64, scores, tokens.dim(1)), tokens, scores);
  CHECK(is_per_row(first_new, scores), first_new, scores);
  CHECK(is_per_row(penalties, DType::f32, scores, 3), penalties, scores);
  CHECK(out.floating() && out.same_shape(scores), out, scores);
  if (scores.numel() == 0) return;

  const PenalizeParams p = penalize_params(scores, tokens, first_new, penalties, out);
  RUN_KERNEL(penalize, p, scores, executor);
}

void bind_sampling(py::module_& m) {
  m.def("sample", op(&sample), py::arg("scores"), py::arg("draws"), py::arg("options"),
        py::arg("tokens"), py::arg("first_new"), py::arg("penalties"), py::arg("scratch"),
        py::arg("out"), py::arg("executor"), nogil());
  m.def("top_k", op(&top_k), py::arg("scores"), py::arg("k"), py::arg("log_softmax"),
        py::arg("values"), py::arg("indices"), py::arg("executor"), nogil());
  m.def("penalize", op(&penalize), py::arg("scores"), py::arg("tokens"), py::arg("first_new"),
        py::arg("penalties"), py::arg("out"), py::arg("executor"), nogil());
}

}  // namespace warpformer
