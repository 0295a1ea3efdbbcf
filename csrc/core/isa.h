// Which instruction set the CPU kernels use. Every cpu.cpp is compiled once per ISA, in a namespace
// of that name; the choice is made at run time, per call, from one table.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/isa_list.h"

namespace warpformer {

#define WF_NAME_(isa) isa,
enum class Isa : uint8_t { WF_FOR_EACH_ISA(WF_NAME_) };
#undef WF_NAME_

/// The best ISA of this CPU.
Isa best_isa();
/// The ISA in use: the best one, or the lower one that WARPFORMER_ISA or set_isa() caps it at.
Isa current_isa();
/// Caps the ISA by name; InputError for a name that is none. A cap above best_isa() is no cap.
void set_isa(const std::string& name);
std::string isa_name(Isa isa);

}  // namespace warpformer

/// CPU_KERNEL(linear)(params, threads), in op.cpp: calls the kernel compiled for the ISA in use.
#define WF_ADDRESS_(isa, name) ::warpformer::cpu::isa::name,
#define CPU_KERNEL(name) \
  (std::array{WF_FOR_EACH_ISA(WF_ADDRESS_, name)}[static_cast<int>(::warpformer::current_isa())])
