#include "core/isa.h"

#include <atomic>
#include <cstdlib>

#include "core/check.h"

namespace warpformer {
namespace {

#define WF_STRING_(isa) #isa,
constexpr std::array kNames{WF_FOR_EACH_ISA(WF_STRING_)};
#undef WF_STRING_

Isa detect() {
  Isa best = Isa::scalar;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (avx2) best = Isa::avx2;
  if (avx512) best = Isa::avx512;
  if (vnni) best = Isa::avx512_vnni;
  if (bf16) best = Isa::avx512_bf16;
#endif
  return best;
}

Isa capped(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return std::min(static_cast<Isa>(i), best_isa());
    known += std::string(i ? ", " : "") + kNames[i];
  }
  throw InputError("isa \"" + name + "\" is none of: " + known);
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = [] {
    const char* cap = std::getenv("WARPFORMER_ISA");
    return cap && *cap ? capped(cap) : best_isa();
  }();
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}
Isa current_isa() { return current().load(std::memory_order_relaxed); }
void set_isa(const std::string& name) { current() = capped(name); }
std::string isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace warpformer
