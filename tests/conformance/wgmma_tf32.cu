#include "conformance/wgmma.h"

namespace warpformer::cuda {
WGMMA_CASES(tf32, tf32, EveryWidth)

}  // namespace warpformer::cuda
