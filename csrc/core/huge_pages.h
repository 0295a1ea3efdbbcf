#pragma once

#include "core/tensor.h"

namespace warpformer {

/// Asks the kernel for 2 MiB pages behind a CPU tensor that nobody has touched yet: a large fresh
/// result otherwise costs a page fault per 4 KiB, more than most row ops' own work. Advice only:
/// where the system gives none, nothing changes.
void advise_huge_pages(const Tensor& t);

}  // namespace warpformer
