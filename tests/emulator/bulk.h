// Host bodies of bulk.cuh.
#pragma once

#include "core/cuda/tensor_map.cuh"
#include "emulator/emulator.h"

namespace warpformer::emulator {

using cuda::TensorMap;

void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier, Where where);
void bulk_store(void* to, uint32_t from, int bytes, Where where);
void bulk_add(void* to, uint32_t from, int bytes, TensorMap::Element element, Where where);
void tensor_load(uint32_t to, const TensorMap& map, const int* coordinates, int rank,
                 uint32_t barrier, Where where);
void tensor_store(const TensorMap& map, const int* coordinates, int rank, uint32_t from, bool add,
                  Where where);
void bulk_commit(Where where);
void bulk_wait(int pending, bool read_only, Where where);

}  // namespace warpformer::emulator
