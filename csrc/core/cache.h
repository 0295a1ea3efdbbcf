#pragma once

#include <cstdint>

namespace warpformer {

/// Whether a call that touches so many bytes leaves none of them in the last-level cache for the
/// next one to find: results are then streamed past it. False where the system does not tell its
/// size.
bool is_past_cache(int64_t bytes);

}  // namespace warpformer
