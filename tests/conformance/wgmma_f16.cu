#include "conformance/wgmma.h"

namespace warpformer::cuda {
WGMMA_CASES(f16, f16, EveryWidth)
WGMMA_MAJOR_CASES(f16, f16, SomeWidths)
}  // namespace warpformer::cuda
