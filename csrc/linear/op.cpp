#include "linear/op.h"

#include <vector>

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
int64_t padded_depth(Format format, int64_t depth) {
  int64_t unit = 1;
  if (format == Format::bf16 || format == Format::int8) unit = 2;
  if (format == Format::int8_dynamic) unit = 4;
  if (is_4_bit(format)) unit = format == Format::int4_dynamic ? kBlock : 8;
  return (depth + unit - 1) / unit * unit;
}

bool is_group(Format format, int64_t group, int64_t depth) {
  if (format < Format::int8 || group >= depth) return true;
  return format != Format::int8_dynamic && (group == 32 || group == 64 || group == 128);
}

Weight weight_layout(Format format, int64_t depth, int64_t panels, int64_t group, bool zeros) {
  constexpr int64_t kLine = 64;
  Weight w{nullptr, format, depth, panels, group};
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = end;
    // A line even of no values: no other part begins at 0, which says that there is none.
    end += bytes ? (bytes + kLine - 1) / kLine * kLine : kLine;
    return at;
  };
  const bool has_groups = format >= Format::int8 && group < depth;
  if (has_groups) w.groups = (depth + group - 1) / group;
  const int64_t tile = format >= Format::int8 ? tile_depth(format) : 1;
  const int64_t length = (padded_depth(format, depth) + tile - 1) / tile * tile;
  take(length * kPanel * bits_of(format) / 8);
  if (has_groups) w.scales = take(w.groups * kPanel * 2);
  if (zeros) w.zeros = take((has_groups ? w.groups : 1) * kPanel);
  if (format == Format::int8_dynamic) w.sums = take(kPanel * 4);
  if (format >= Format::int8) w.factors = take(kPanel * 4);
  // An odd number of cache lines: neighbouring panels, which are read together, fall into different
  // sets.
  w.size = end / kLine % 2 ? end : end + kLine;
  return w;
}

namespace {

constexpr const char* kFormats[] = {"f32",          "f16",  "bf16",         "int8",
                                    "int8_dynamic", "int4", "int4_dynamic", "nf4"};

bool is_format(const std::string& name, Format& format) {
  for (int i = 0; i < 8; ++i)
    if (name == kFormats[i]) {
      format = static_cast<Format>(i);
      return true;
    }
  return false;
}

int64_t panels_of(int64_t rows, bool gated) {
  return gated ? 2 * ((rows / 2 + kPanel - 1) / kPanel) : (rows + kPanel - 1) / kPanel;
}

/// The weight in `packed`, of `rows` rows of `depth` elements; that of the first of several
/// experts.
Weight weight_of(const char* op, const Tensor& packed, const std::string& format, int64_t rows,
                 int64_t depth, int64_t group_size, bool zero_points, bool gated,
                 bool experts = false) {
  Format f;
  CHECK_FOR(op, is_format(format, f), format);
  CHECK_FOR(op, rows >= 0 && depth >= 0, rows, depth);
  CHECK_FOR(op, !gated || rows % 2 == 0, gated, rows);
  CHECK_FOR(op, is_group(f, group_size, depth), group_size, depth, format);
  CHECK_FOR(op, !zero_points || (is_4_bit(f) && f != Format::nf4), zero_points, format);
  CHECK_FOR(op, f != Format::int8_dynamic || depth <= kMaxInt8Depth, depth, format);
  Weight w = weight_layout(f, depth, panels_of(rows, gated), group_size, zero_points);
  CHECK_FOR(op,
            packed.dtype == DType::u8 && packed.ndim == (experts ? 3 : 2) && packed.contiguous(),
            packed);
  CHECK_FOR(op, packed.dim(-2) == w.panels && packed.dim(-1) == w.size, packed, format, rows, depth,
            group_size);
  w.data = packed.ptr<uint8_t>();
  return w;
}

DType dtype_of(Format format) {
  switch (format) {
    case Format::f32:
      return DType::f32;
    case Format::f16:
      return DType::f16;
    case Format::bf16:
      return DType::bf16;
    case Format::int8:
    case Format::int8_dynamic:
      return DType::i8;
    default:
      return DType::u8;
  }
}

PackLinearParams pack_params(const char* op, const Tensor& weight,
                             const std::optional<Tensor>& scales,
                             const std::optional<Tensor>& zeros, const Tensor& packed,
                             const std::string& format, int64_t out_features, int64_t in_features,
                             int64_t group_size, bool gated) {
  CHECK_FOR(op, weight.ndim == 2, weight);
  const Weight w = weight_of(op, packed, format, out_features, in_features, group_size,
                             zeros.has_value(), gated);
  CHECK_FOR(op, weight.dtype == dtype_of(w.format), weight, format);
  CHECK_FOR(op, weight.dim(1) == (is_4_bit(w.format) ? (in_features + 1) / 2 : in_features), weight,
            in_features, format);
  const int64_t groups = w.groups ? w.groups : 1;
  CHECK_FOR(op, scales.has_value() == (w.format >= Format::int8), scales, format);
  if (scales)
    CHECK_FOR(op,
              scales->floating() && scales->ndim == 2 && scales->dim(0) == weight.dim(0) &&
                  scales->dim(1) == groups,
              *scales, weight, group_size);
  if (zeros)
    CHECK_FOR(op, zeros->dtype == DType::u8 && zeros->same_shape(*scales), *zeros, *scales);
  PackLinearParams p{rows(weight)};
  if (scales) p.scales = rows(*scales);
  if (zeros) p.zeros = rows(*zeros);
  p.weight = w;
  p.half = gated ? weight.dim(0) / 2 : 0;
  return p;
}

/// The values of a tensor [M], which are rows below `end`.
std::vector<int64_t> indices(const char* op, const Tensor& index, int64_t end) {
  CHECK_FOR(op, index.dtype == DType::i32 || index.dtype == DType::i64, index);
  CHECK_FOR(op, index.ndim == 1, index);
  std::vector<int64_t> values(index.dim(0));
  for (int64_t i = 0; i < index.dim(0); ++i) {
    const int64_t at = i * index.stride[0];
    const int64_t id =
        index.dtype == DType::i32 ? index.ptr<int32_t>()[at] : index.ptr<int64_t>()[at];
    CHECK_FOR(op, 0 <= id && id < end, index, i, id, end);
    values[i] = id;
  }
  return values;
}

/// On CUDA products of dense weights are torch's.
bool has_cuda_kernel(Format format) { return format >= Format::int8; }

}  // namespace

int64_t linear_workspace([[maybe_unused]] const Tensor& x, const std::string& format, int64_t) {
  Format f;
  CHECK(is_format(format, f), format);
  if (runs_on_cpu(x) || !x.floating() || x.ndim == 0 || !has_cuda_kernel(f)) return 0;
#if defined(WARPFORMER_CUDA) || defined(WARPFORMER_EMULATED)
  return cuda::workspace_size(rows(x), f);
#else
  return 0;
#endif
}

void set_workspace(const char* op, LinearParams& p, const Tensor& x,
                   const std::optional<Tensor>& workspace, const std::string& format,
                   int64_t executor) {
  const int64_t size = linear_workspace(x, format, executor);
  CHECK_FOR(op, (workspace ? workspace->numel() * workspace->item_size() : 0) >= size, workspace,
            x);
  p.workspace = size ? workspace->data : nullptr;
}

/// RUN_KERNEL where the format has one on CUDA.
#define RUN_FOR_FORMAT(name, p, x, executor)  \
  do {                                        \
    if (has_cuda_kernel((p).weight.format)) { \
      RUN_KERNEL(name, p, x, executor);       \
    } else {                                  \
      RUN_CPU_KERNEL(name, p, x, executor);   \
    }                                         \
  } while (0)

int64_t packed_size(const std::string& format, int64_t in_features, int64_t group_size,
                    bool zero_points) {
  Format f;
  CHECK_FOR("pack_linear", is_format(format, f), format);
  CHECK_FOR("pack_linear", in_features >= 0, in_features);
  CHECK_FOR("pack_linear", is_group(f, group_size, in_features), group_size, in_features, format);
  return weight_layout(f, in_features, 0, group_size, zero_points).size;
}

void pack_linear(const Tensor& weight, const std::optional<Tensor>& scales,
                 const std::optional<Tensor>& zeros, const Tensor& packed,
                 const std::string& format, int64_t in_features, int64_t group_size, bool gated,
                 int64_t executor) {
  CHECK_TENSORS(weight, scales, zeros, packed);
  const PackLinearParams p = pack_params(__func__, weight, scales, zeros, packed, format,
                                         weight.dim(0), in_features, group_size, gated);
  if (packed.numel()) RUN_FOR_FORMAT(pack_linear, p, weight, executor);
}

void unpack_linear(const Tensor& packed, const Tensor& weight, const std::optional<Tensor>& scales,
                   const std::optional<Tensor>& zeros, const std::optional<Tensor>& index,
                   const std::string& format, int64_t out_features, int64_t in_features,
                   int64_t group_size, bool gated, int64_t executor) {
  CHECK_TENSORS(packed, weight, scales, zeros, index);
  PackLinearParams p = pack_params(__func__, weight, scales, zeros, packed, format, out_features,
                                   in_features, group_size, gated);
  CHECK(weight.dim(0) == (index ? index->dim(0) : out_features), weight, index, out_features);
  if (packed.numel() == 0 || weight.dim(0) == 0) return;
  if (!index) {
    RUN_FOR_FORMAT(unpack_linear, p, packed, executor);
    return;
  }
  CHECK(!gated, gated);
  if (runs_on_cpu(packed)) {
    const std::vector<int64_t> rows = indices(__func__, *index, out_features);
    p.index = rows.data();
    RUN_CPU_KERNEL(unpack_linear, p, packed, executor);
  } else {
    CHECK(index->dtype == DType::i64 && index->ndim == 1 && index->contiguous(), index);
    p.index = index->ptr<int64_t>();
    RUN_FOR_FORMAT(unpack_linear, p, packed, executor);
  }
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, const Tensor& out, const std::string& format,
            int64_t group_size, bool zero_points, bool gated, const std::string& activation,
            const std::optional<Tensor>& workspace, int64_t executor) {
  CHECK_TENSORS(x, weight, bias, residual, out, workspace);
  CHECK(x.floating() && x.ndim > 0, x);
  CHECK(out.floating() && out.ndim == x.ndim, out, x);
  for (int i = 0; i + 1 < x.ndim; ++i) CHECK(out.dim(i) == x.dim(i), out, x);
  const int64_t features = out.dim(-1) * (gated ? 2 : 1);
  if (bias) CHECK(bias->floating() && bias->ndim == 1 && bias->dim(0) == features, bias, out);
  if (residual) CHECK(residual->floating() && residual->same_shape(out), residual, out);
  LinearParams p{rows(x)};
  p.weight =
      weight_of(__func__, weight, format, features, x.dim(-1), group_size, zero_points, gated);
  CHECK(is_activation(activation.c_str(), p.activation), activation);
  if (out.numel() == 0) return;

  if (bias) p.bias = rows(*bias);
  if (residual) p.residual = rows(*residual);
  p.out = rows(out);
  p.gated = gated;
  p.rows = p.x.count;
  set_workspace(__func__, p, x, workspace, format, executor);
  RUN_FOR_FORMAT(linear, p, x, executor);
}

void linear_backward(const Tensor& grad, const Tensor& weight, const Tensor& dx,
                     const std::string& format, int64_t group_size, bool zero_points,
                     int64_t executor) {
  CHECK_TENSORS(grad, weight, dx);
  CHECK(grad.floating() && grad.ndim > 0, grad);
  CHECK(dx.floating() && dx.ndim == grad.ndim, dx, grad);
  for (int i = 0; i + 1 < dx.ndim; ++i) CHECK(dx.dim(i) == grad.dim(i), dx, grad);
  LinearBackwardParams p{rows(grad), rows(dx)};
  p.weight =
      weight_of(__func__, weight, format, grad.dim(-1), dx.dim(-1), group_size, zero_points, false);
  if (dx.numel() == 0) return;
  p.rows = p.dy.count;
  RUN_FOR_FORMAT(linear_backward, p, grad, executor);
}

namespace {

void check_offsets(const char* op, const Tensor& offsets, const Tensor& weight) {
  CHECK_FOR(op, offsets.dtype == DType::i32 || offsets.dtype == DType::i64, offsets);
  CHECK_FOR(op, offsets.ndim == 1 && offsets.contiguous(), offsets);
  CHECK_FOR(op, weight.ndim == 3 && weight.dim(0) == offsets.dim(0), weight, offsets);
}

/// Where the rows of each expert end: 0, ..., `count`, in ascending order.
std::vector<int64_t> ends_of(const char* op, const Tensor& offsets, int64_t count) {
  std::vector<int64_t> ends(offsets.dim(0));
  int64_t last = 0;
  for (int64_t e = 0; e < offsets.dim(0); ++e) {
    ends[e] = offsets.dtype == DType::i32 ? offsets.ptr<int32_t>()[e] : offsets.ptr<int64_t>()[e];
    CHECK_FOR(op, ends[e] >= last && ends[e] <= count, offsets, e, ends[e], last, count);
    last = ends[e];
  }
  CHECK_FOR(op, last == count, offsets, last, count);
  return ends;
}

/// For the device, which alone knows the values.
Experts experts_of(const Tensor& offsets) {
  return {offsets.data, offsets.dtype == DType::i64, static_cast<int>(offsets.dim(0))};
}

}  // namespace

void grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                    const std::optional<Tensor>& bias, const Tensor& out, const std::string& format,
                    int64_t group_size, bool zero_points, bool gated, const std::string& activation,
                    const std::optional<Tensor>& workspace, int64_t executor) {
  CHECK_TENSORS(x, weight, offsets, bias, out, workspace);
  CHECK(x.floating() && x.ndim == 2, x);
  CHECK(out.floating() && out.ndim == 2 && out.dim(0) == x.dim(0), out, x);
  const int64_t features = out.dim(-1) * (gated ? 2 : 1);
  check_offsets(__func__, offsets, weight);
  if (bias)
    CHECK(bias->floating() && bias->ndim == 2 && bias->dim(0) == weight.dim(0) &&
              bias->dim(1) == features,
          bias, weight, out);
  LinearParams p{rows(x)};
  p.weight = weight_of(__func__, weight, format, features, x.dim(-1), group_size, zero_points,
                       gated, true);
  CHECK(is_activation(activation.c_str(), p.activation), activation);
  if (bias) p.bias = rows(*bias);
  p.out = rows(out);
  p.gated = gated;
  if (!runs_on_cpu(x)) {
    if (out.numel() == 0) return;
    p.rows = p.x.count;
    p.experts = experts_of(offsets);
    set_workspace(__func__, p, x, workspace, format, executor);
    RUN_FOR_FORMAT(linear, p, x, executor);
    return;
  }
  const std::vector<int64_t> ends = ends_of(__func__, offsets, x.dim(0));
  if (out.numel() == 0) return;
  for (int64_t e = 0; e < offsets.dim(0); ++e, p.weight.data += p.weight.panels * p.weight.size) {
    p.bias_row = e;
    p.first = e ? ends[e - 1] : 0;
    p.rows = ends[e] - p.first;
    if (p.rows) RUN_CPU_KERNEL(linear, p, x, executor);
  }
}

void grouped_linear_backward(const Tensor& grad, const Tensor& weight, const Tensor& offsets,
                             const Tensor& dx, const std::string& format, int64_t group_size,
                             bool zero_points, int64_t executor) {
  CHECK_TENSORS(grad, weight, offsets, dx);
  CHECK(grad.floating() && grad.ndim == 2, grad);
  CHECK(dx.floating() && dx.ndim == 2 && dx.dim(0) == grad.dim(0), dx, grad);
  check_offsets(__func__, offsets, weight);
  LinearBackwardParams p{rows(grad), rows(dx)};
  p.weight = weight_of(__func__, weight, format, grad.dim(-1), dx.dim(-1), group_size, zero_points,
                       false, true);
  if (!runs_on_cpu(grad)) {
    if (dx.numel() == 0) return;
    p.rows = p.dy.count;
    p.experts = experts_of(offsets);
    RUN_FOR_FORMAT(linear_backward, p, grad, executor);
    return;
  }
  const std::vector<int64_t> ends = ends_of(__func__, offsets, grad.dim(0));
  if (dx.numel() == 0) return;
  for (int64_t e = 0; e < offsets.dim(0); ++e, p.weight.data += p.weight.panels * p.weight.size) {
    p.first = e ? ends[e - 1] : 0;
    p.rows = ends[e] - p.first;
    if (p.rows) RUN_CPU_KERNEL(linear_backward, p, grad, executor);
  }
}

void bind_linear(py::module_& m) {
  m.def("packed_size", &packed_size, py::arg("format"), py::arg("in_features"),
        py::arg("group_size"), py::arg("zero_points"));
  m.def("pack_linear", op(&pack_linear), py::arg("weight"), py::arg("scales"), py::arg("zeros"),
        py::arg("packed"), py::arg("format"), py::arg("in_features"), py::arg("group_size"),
        py::arg("gated"), py::arg("executor"), nogil());
  m.def("unpack_linear", op(&unpack_linear), py::arg("packed"), py::arg("weight"),
        py::arg("scales"), py::arg("zeros"), py::arg("index"), py::arg("format"),
        py::arg("out_features"), py::arg("in_features"), py::arg("group_size"), py::arg("gated"),
        py::arg("executor"), nogil());
  m.def("linear", op(&linear), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("residual"), py::arg("out"), py::arg("format"), py::arg("group_size"),
        py::arg("zero_points"), py::arg("gated"), py::arg("activation"), py::arg("workspace"),
        py::arg("executor"), nogil());
  m.def("linear_workspace", &linear_workspace, py::arg("x"), py::arg("format"), py::arg("executor"),
        nogil());
  m.def("grouped_linear", op(&grouped_linear), py::arg("x"), py::arg("weight"), py::arg("offsets"),
        py::arg("bias"), py::arg("out"), py::arg("format"), py::arg("group_size"),
        py::arg("zero_points"), py::arg("gated"), py::arg("activation"), py::arg("workspace"),
        py::arg("executor"), nogil());
  m.def("grouped_linear_backward", op(&grouped_linear_backward), py::arg("grad"), py::arg("weight"),
        py::arg("offsets"), py::arg("dx"), py::arg("format"), py::arg("group_size"),
        py::arg("zero_points"), py::arg("executor"), nogil());
  m.def("linear_backward", op(&linear_backward), py::arg("grad"), py::arg("weight"), py::arg("dx"),
        py::arg("format"), py::arg("group_size"), py::arg("zero_points"), py::arg("executor"),
        nogil());
}

}  // namespace warpformer
