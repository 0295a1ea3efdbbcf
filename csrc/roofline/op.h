// roofline: what this machine can do at most, to judge the kernels by
//
//   peak_f32, peak_bf16, peak_int8   multiply-adds on registers, from instructions the compiler
//                                    cannot shorten (asm)
//   read, copy                       bytes of arrays that are past the last-level cache
//
// The instructions are those of the ISA in use: FMA (SSE2: multiply, add), vdpbf16ps, vpdpbusd, and
// before VNNI vpmaddubsw + vpmaddwd + vpaddd. work is 0 where the ISA has none for the type.
#pragma once

#include <cstdint>

#include "core/isa_list.h"

namespace warpformer {

enum class Limit : int { peak_f32, peak_bf16, peak_int8, read, copy };

struct RooflineParams {
  Limit limit;
  int64_t rounds;
  char* memory;  // read: [bytes], copy: [2, bytes]
  int64_t bytes;
  double* work;  // operations (two a multiply-add) or bytes of all threads
};
DECLARE_CPU_KERNEL(roofline, RooflineParams)

}  // namespace warpformer
