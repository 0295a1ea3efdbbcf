// Working memory of CPU kernels: one buffer per calling thread, grown when needed and reused. Taken
// before a parallel region and split among its threads, so that running out of memory is an
// exception in the caller and never the end of the process. No inline functions: kernels of every
// ISA include this.
#pragma once

#include <stddef.h>

namespace warpformer {

/// At least `bytes` bytes at a 64-byte boundary, valid until this thread's next call.
/// Throws std::bad_alloc.
void* scratch(size_t bytes);
float* scratch_floats(size_t n);

}  // namespace warpformer
