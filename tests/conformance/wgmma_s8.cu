#include "conformance/wgmma.h"

namespace warpformer::cuda {
WGMMA_CASES(s8, int8_t, IntegerWidths)

namespace {

// One warpgroup gives its registers to two others, which take them: [thread] = 2 thread + 1.
KERNEL(384, 1) set_registers(int32_t* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (warp_index() < 4) {
    decrease_registers<24>();
    store(out + thread_index(), 2 * thread_index() + 1);
  } else {
    increase_registers<240>();
    const int thread = thread_index();
    store(out + thread, 2 * thread + 1);
  }
#endif
}
CASE(wgmma_set_registers) { LAUNCH(set_registers, 1, 384, 0, call.stream, call.output<int32_t>()); }

}  // namespace
}  // namespace warpformer::cuda
