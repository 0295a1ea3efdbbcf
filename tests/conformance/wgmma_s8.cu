#include "conformance/wgmma.h"

namespace warpformer::cuda {
WGMMA_CASES(s8, int8_t, IntegerWidths)

}  // namespace warpformer::cuda
