// The swizzles that spread the 16-byte chunks of a tile's rows over the banks of shared memory:
// those of bulk tensor copies and wgmma, free for any other use.
#pragma once

#include "core/cuda/thread.cuh"

namespace warpformer::cuda {

/// The bytes of a row within which chunks change places; 16 is a chunk alone.
enum class Swizzle : int { none = 16, bytes32 = 32, bytes64 = 64, bytes128 = 128 };

/// Where the byte at `offset` goes: the number of its chunk XOR that of its 128-byte line. Counted
/// from a multiple of 8 spans in shared memory.
template <Swizzle mode>
DEVICE uint32_t swizzle(uint32_t offset) {
  return offset ^ ((offset >> 3) & (static_cast<uint32_t>(mode) - 16));
}

}  // namespace warpformer::cuda
