#include "conformance/wgmma.h"

namespace warpformer::cuda {
WGMMA_CASES(bf16, bf16, EveryWidth)
WGMMA_MAJOR_CASES(bf16, bf16, SomeWidths)
}  // namespace warpformer::cuda
