// Kernels that use bulk copies, with a bug that can be switched on; the lines marked "caught:
// <name>" are those the emulator names. Tensors are 32 x 32 floats, boxes 16 x 32: two blocks, one
// box each.
#include "core/cuda/bulk.cuh"
#include "core/cuda/ptx.cuh"
#include "emulator/self_test.h"

namespace warpformer::cuda {
namespace {

constexpr int kWidth = 32, kRows = 16, kBox = kWidth * kRows, kBoxBytes = 4 * kBox;

/// What all kernels here have: a box at a multiple of 1024 bytes and, before it, a barrier.
struct Stage {
  Barrier barrier{shared_memory<uint64_t>()};
  Shared<float> tile =
      shared_memory<float>(16) +
      static_cast<int>((1024 - (shared_memory<float>(16).address()) % 1024) % 1024 / 4);
  int coordinates[2] = {0, static_cast<int>(kRows * block_index())};
  int first = static_cast<int>(kBox * block_index());  // of the block's elements

  DEVICE void init() {
    if (thread_index() == 0) {
      barrier.init(1);
      fence_barrier_init();
    }
    sync_block();
  }
  DEVICE void fill(const float* in) {
    for (int i = thread_index(); i < kBox; i += block_threads())
      tile.store(i, load(in + first + i));
  }
};

KERNEL(64)
tensor_load_expects_half(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                         const float*, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(broken ? kBoxBytes / 2 : kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);
  }
  s.barrier.wait(0);  // caught: tensor_load_expects_half
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

KERNEL(64)
tensor_load_expects_more(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                         const float*, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(broken ? kBoxBytes + 16 : kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);
  }
  s.barrier.wait(0);  // caught: tensor_load_expects_more
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

KERNEL(64)
tensor_load_not_waited(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                       const float*, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);  // caught: tensor_load_not_waited
  }
  if (!broken || thread_index() != 40) s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));  // caught: tensor_load_not_waited
}

KERNEL(64)
tensor_load_misaligned(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                       const float*, float* out, bool broken) {
  Stage s;
  s.init();
  if (broken) s.tile = s.tile + 16;
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);  // caught: tensor_load_misaligned
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

/// The tile was used before: a load may not overwrite it while others still read.
KERNEL(64)
tensor_load_over_readers(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                         const float* in, float* out, bool broken) {
  Stage s;
  s.init();
  s.fill(in);
  sync_block();
  float sum = 0;
  for (int i = thread_index(); i < kBox; i += block_threads())
    sum += s.tile.load(i ^ 1);  // caught: tensor_load_over_readers
  fence_proxy_async();
  if (!broken) sync_block();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);  // caught: tensor_load_over_readers
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, sum == -1e30f ? sum : s.tile.load(i));
}

/// The map swizzles; a kernel that forgets it reads other elements.
KERNEL(64)
tensor_load_swizzled(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                     const float*, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads()) {
    const auto offset = static_cast<uint32_t>(4 * i);
    store(
        out + s.first + i,
        s.tile.load(static_cast<int>((broken ? offset : swizzle<Swizzle::bytes128>(offset)) / 4)));
  }
}

KERNEL(64)
barrier_init_not_fenced(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                        const float*, float* out, bool broken) {
  Stage s;
  if (thread_index() == 0) {
    s.barrier.init(1);
    if (!broken) fence_barrier_init();
  }
  sync_block();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    tensor_load(s.tile, from, s.coordinates, s.barrier);  // caught: barrier_init_not_fenced
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

/// What other threads wrote must be fenced for the copy engine, by writer or reader.
KERNEL(64)
tensor_store_not_fenced(const GRID_CONSTANT TensorMap, const GRID_CONSTANT TensorMap to,
                        const float* in, float*, bool broken) {
  Stage s;
  s.fill(in);
  if (!broken) fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    tensor_store(to, s.coordinates, s.tile);  // caught: tensor_store_not_fenced
    bulk_commit();
    bulk_wait_read<0>();
  }
}

KERNEL(64)
tensor_store_not_synchronized(const GRID_CONSTANT TensorMap, const GRID_CONSTANT TensorMap to,
                              const float* in, float*, bool broken) {
  Stage s;
  s.fill(in);
  fence_proxy_async();
  if (!broken) sync_block();
  if (thread_index() == 0) {
    tensor_store(to, s.coordinates, s.tile);  // caught: tensor_store_not_synchronized
    bulk_commit();
    bulk_wait_read<0>();
  }
}

/// The source is written again: only after bulk_wait_read.
KERNEL(64)
tensor_store_source_reused(const GRID_CONSTANT TensorMap, const GRID_CONSTANT TensorMap to,
                           const float* in, float*, bool broken) {
  Stage s;
  s.fill(in);
  fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    tensor_store(to, s.coordinates, s.tile);  // caught: tensor_store_source_reused
    bulk_commit();
    if (!broken) bulk_wait_read<0>();
  }
  sync_block();
  s.tile.store(thread_index(), 0.0f);  // caught: tensor_store_source_reused
  if (broken && thread_index() == 0) bulk_wait_read<0>();
}

KERNEL(64)
tensor_store_not_waited(const GRID_CONSTANT TensorMap, const GRID_CONSTANT TensorMap to,
                        const float* in, float*, bool broken) {
  Stage s;
  s.fill(in);
  fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    tensor_store(to, s.coordinates, s.tile);  // caught: tensor_store_not_waited
    bulk_commit();
    if (!broken) bulk_wait_read<0>();
  }
}

KERNEL(64)
bulk_load_out_of_bounds(const GRID_CONSTANT TensorMap, const GRID_CONSTANT TensorMap,
                        const float* in, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    const float* from = in + s.first + (broken ? 4 : 0);
    bulk_load(s.tile, from, kBoxBytes, s.barrier);  // caught: bulk_load_out_of_bounds
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

KERNEL(64)
bulk_load_of_odd_bytes(const GRID_CONSTANT TensorMap, const GRID_CONSTANT TensorMap,
                       const float* in, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    const int bytes = broken ? kBoxBytes - 8 : kBoxBytes;
    s.barrier.arrive_expect(bytes);
    bulk_load(s.tile, in + s.first, bytes, s.barrier);  // caught: bulk_load_of_odd_bytes
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

/// A map of two dimensions wants two coordinates.
KERNEL(64)
tensor_load_of_another_rank(const GRID_CONSTANT TensorMap from, const GRID_CONSTANT TensorMap,
                            const float*, float* out, bool broken) {
  Stage s;
  s.init();
  if (thread_index() == 0) {
    s.barrier.arrive_expect(kBoxBytes);
    if (broken) {
      tensor_load(s.tile, from, {0}, s.barrier);  // caught: tensor_load_of_another_rank
    } else {
      tensor_load(s.tile, from, s.coordinates, s.barrier);
    }
  }
  s.barrier.wait(0);
  for (int i = thread_index(); i < kBox; i += block_threads())
    store(out + s.first + i, s.tile.load(i));
}

}  // namespace
}  // namespace warpformer::cuda

namespace warpformer::emulator {

using namespace warpformer::cuda;

/// Binds a kernel with the maps of its tensors.
#define PLANT_BOXES(kernel, swizzle)                                                      \
  m.def(                                                                                  \
      #kernel,                                                                            \
      [](Tensor in, Tensor out, bool broken) {                                            \
        auto map = [](const float* data) {                                                \
          return make_tensor_map(data, {kWidth, 2 * kRows}, {1, kWidth}, {kWidth, kRows}, \
                                 swizzle);                                                \
        };                                                                                \
        LAUNCH(kernel, 2, 64, kBoxBytes + 2048, Stream{}, map(in.ptr<float>()),           \
               map(out.ptr<float>()), in.ptr<float>(), out.ptr<float>(), broken);         \
      },                                                                                  \
      nogil())

void bind_bulk(py::module_& m) {
  PLANT_BOXES(tensor_load_expects_half, Swizzle::none);
  PLANT_BOXES(tensor_load_expects_more, Swizzle::none);
  PLANT_BOXES(tensor_load_not_waited, Swizzle::none);
  PLANT_BOXES(tensor_load_misaligned, Swizzle::none);
  PLANT_BOXES(tensor_load_over_readers, Swizzle::none);
  PLANT_BOXES(tensor_load_swizzled, Swizzle::bytes128);
  PLANT_BOXES(barrier_init_not_fenced, Swizzle::none);
  PLANT_BOXES(tensor_store_not_fenced, Swizzle::none);
  PLANT_BOXES(tensor_store_not_synchronized, Swizzle::none);
  PLANT_BOXES(tensor_store_source_reused, Swizzle::none);
  PLANT_BOXES(tensor_store_not_waited, Swizzle::none);
  PLANT_BOXES(bulk_load_out_of_bounds, Swizzle::none);
  PLANT_BOXES(bulk_load_of_odd_bytes, Swizzle::none);
  PLANT_BOXES(tensor_load_of_another_rank, Swizzle::none);
  m.def("make_map", [](Tensor data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides,
                       std::array<int, 2> box, int span) {
    const int64_t size[2] = {sizes[0], sizes[1]}, stride[2] = {strides[0], strides[1]};
    const int width[2] = {box[0], box[1]};
    make_tensor_map(data.ptr<float>(), size, stride, width, static_cast<Swizzle>(span));
  });
}

}  // namespace warpformer::emulator
