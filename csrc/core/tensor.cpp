#include "core/tensor.h"

namespace warpformer {

std::string to_string(const Tensor& t) {
  static const char* const kNames[] = {
      "f32", "f16", "bf16", "i8", "u8", "i32", "i64", "bool", "unsupported dtype"};
  std::string s = kNames[static_cast<int>(t.dtype)];
  s += '[';
  for (int i = 0; i < t.ndim; ++i) {
    if (i) s += ',';
    s += std::to_string(t.shape[i]);
  }
  s += ']';
  if (t.device.type == DeviceType::cpu) s += " cpu";
  if (t.device.type == DeviceType::cuda) s += " cuda:" + std::to_string(t.device.index);
  if (t.device.type == DeviceType::unsupported) s += " on an unsupported device";
  if (t.data == nullptr && t.numel() > 0) s += " without memory";
  return s;
}

}  // namespace warpformer
