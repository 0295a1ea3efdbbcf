#include <cuda_runtime_api.h>

#include "core/cuda/runtime.h"

namespace warpformer::cuda {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace warpformer::cuda
