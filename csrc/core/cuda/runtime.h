// What warpformer.info() tells of CUDA. Versions are 1000 major + 10 minor, as CUDA counts them.
#pragma once

namespace warpformer::cuda {

/// Of the toolkit this was built with; 0 for a build without CUDA.
int runtime_version();
/// The newest CUDA the installed driver serves; 0 without a driver or for a build without CUDA.
int driver_version();

}  // namespace warpformer::cuda
