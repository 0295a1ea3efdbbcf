// What a bulk tensor copy knows of a tensor in global memory and of the boxes it moves; made on the
// host and passed to kernels by value, as `const GRID_CONSTANT TensorMap map`.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/cuda/swizzle.cuh"

#ifndef WARPFORMER_EMULATED
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace warpformer::cuda {

/// 128 bytes that only the copy engine reads.
struct alignas(128) TensorMap {
#ifdef WARPFORMER_EMULATED
  enum class Element : uint8_t { bytes, f32, bf16, f16, i32 };
  char* data;
  int64_t sizes[5], strides[5];  // in elements, in bytes
  int16_t box[5];
  uint8_t rank, element_bytes, span;
  Element element;  // what an addition adds
#else
  CUtensorMap map;
#endif
};
static_assert(sizeof(TensorMap) == 128);

/// What the driver asks of a tensor map, and one thing more: the rows of a swizzled box fill the
/// swizzle's span.
inline void check_tensor_map(const void* data, int rank, const int64_t* sizes,
                             const int64_t* strides, const int* box, int element_bytes,
                             Swizzle swizzle) {
  auto check = [](bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(std::string("tensor map: ") + what);
  };
  const int span = static_cast<int>(swizzle), inner = box[0] * element_bytes;
  check(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the address is a multiple of 16");
  check(strides[0] == 1, "the innermost stride is 1");
  check(inner % 16 == 0, "the inner box is a multiple of 16 bytes");
  check(swizzle == Swizzle::none || inner == span, "the inner box has the swizzle's width");
  for (int i = 0; i < rank; ++i) {
    check(sizes[i] >= 1 && sizes[i] <= int64_t{1} << 32, "sizes are 1 to 2^32");
    check(box[i] >= 1 && box[i] <= 256, "the box is 1 to 256 wide");
    const int64_t bytes = strides[i] * element_bytes;
    check(i == 0 || (bytes % 16 == 0 && bytes >= 0 && bytes < int64_t{1} << 40),
          "outer strides are multiples of 16 bytes below 2^40");
  }
}

#ifdef WARPFORMER_EMULATED

template <class T>
constexpr TensorMap::Element kElement = std::is_same_v<T, float>     ? TensorMap::Element::f32
                                        : std::is_same_v<T, bf16>    ? TensorMap::Element::bf16
                                        : std::is_same_v<T, f16>     ? TensorMap::Element::f16
                                        : std::is_same_v<T, int32_t> ? TensorMap::Element::i32
                                                                     : TensorMap::Element::bytes;

#else

template <class T>
constexpr CUtensorMapDataType kElement =
    std::is_same_v<T, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
    : std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    : std::is_same_v<T, f16>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    : sizeof(T) == 4          ? CU_TENSOR_MAP_DATA_TYPE_INT32
    : sizeof(T) == 2          ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                              : CU_TENSOR_MAP_DATA_TYPE_UINT8;

/// The driver's encoder, found at run time: nothing here links libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static void* const entry = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess || !found)
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled: it must be 525 or newer");
    return found;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
}

#endif

/// A tensor of `rank` dimensions, innermost first, in elements of T (float, bf16, f16, or an
/// integer of 1, 2 or 4 bytes); copies move boxes of it. strides[0] is 1.
template <class T, int rank>
TensorMap make_tensor_map(const T* data, const int64_t (&sizes)[rank],
                          const int64_t (&strides)[rank], const int (&box)[rank],
                          Swizzle swizzle = Swizzle::none) {
  static_assert(rank >= 1 && rank <= 5, "tensor maps have 1 to 5 dimensions");
  static_assert(std::is_trivially_copyable_v<T> &&
                (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4));
  check_tensor_map(data, rank, sizes, strides, box, sizeof(T), swizzle);
  TensorMap map{};
#ifdef WARPFORMER_EMULATED
  map.data = const_cast<char*>(reinterpret_cast<const char*>(data));
  map.rank = rank, map.element_bytes = sizeof(T), map.element = kElement<T>;
  map.span = static_cast<uint8_t>(swizzle);
  for (int i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i];
    map.strides[i] = strides[i] * static_cast<int64_t>(sizeof(T));
    map.box[i] = static_cast<int16_t>(box[i]);
  }
#else
  cuuint64_t wide_sizes[rank], bytes[rank];
  cuuint32_t wide_box[rank], steps[rank];
  for (int i = 0; i < rank; ++i) {
    wide_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    wide_box[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i]) * sizeof(T);
  }
  const CUtensorMapSwizzle mode = swizzle == Swizzle::none      ? CU_TENSOR_MAP_SWIZZLE_NONE
                                  : swizzle == Swizzle::bytes32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                  : swizzle == Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult result =
      tensor_map_encoder()(&map.map, kElement<T>, rank, const_cast<T*>(data), wide_sizes, bytes,
                           wide_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(result));
#endif
  return map;
}

}  // namespace warpformer::cuda
