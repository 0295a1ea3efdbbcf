// Bulk copies of bytes and of boxes (sm_90).
#include <array>

#include "conformance/case.h"

namespace warpformer::cuda {
namespace {

constexpr int kLine = 1024;  // what the base of shared memory is rounded up to

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// The first multiple of 1024 bytes of shared memory after the first 16.
DEVICE Shared<uint8_t> aligned_space() {
  const auto base = shared_memory<uint8_t>(16);
  return base + static_cast<int>((kLine - base.address() % kLine) % kLine);
}
DEVICE Barrier start_barrier() {
  const Barrier barrier(shared_memory<uint64_t>());
  if (thread_index() == 0) {
    barrier.init(1);
    fence_barrier_init();
  }
  sync_block();
  return barrier;
}
#endif

// Bytes in and, another way round, out again: out = in shifted by 16 bytes within the copied part;
// and additions of T.
template <class T>
KERNEL(64)
bytes(const uint8_t* in, uint8_t* out, int count) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const auto space = aligned_space();
  const Barrier barrier = start_barrier();
  if (thread_index() == 0) {
    barrier.expect(count);
    bulk_load(space, in, count - 16, barrier);
    barrier.arrive();
    bulk_load(space + (count - 16), in + (count - 16), 16, barrier);
  }
  barrier.wait(0);
  for (int i = thread_index(); i < count / 2; i += block_threads()) {
    const uint8_t low = space.load(i), high = space.load(i + count / 2);
    space.store(i, high);
    space.store(i + count / 2, low);
  }
  fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    bulk_store(out, space, count);
    bulk_commit();
    bulk_wait<0>();
    if constexpr (!std::is_same_v<T, uint8_t>) {
      bulk_add(reinterpret_cast<T*>(out), space.as<T>(), count);
      bulk_add(reinterpret_cast<T*>(out + 16), space.as<T>(), 16);
      bulk_commit();
    }
    bulk_wait_read<0>();
  }
#endif
}
template <class T>
void run_bytes(const conformance::Call& call) {
  const int count = static_cast<int>(call.result_bytes);
  LAUNCH(bytes<T>, 1, 64, static_cast<size_t>(count + 2 * kLine), call.stream,
         call.input<uint8_t>(0), call.output<uint8_t>(), count);
}
CASE(bulk_copy) { run_bytes<uint8_t>(call); }
CASE(bulk_add_f32) { run_bytes<float>(call); }
CASE(bulk_add_bf16) { run_bytes<bf16>(call); }
CASE(bulk_add_f16) { run_bytes<f16>(call); }
CASE(bulk_add_i32) { run_bytes<int32_t>(call); }

// ---- Boxes. Numbers: rank, then sizes, strides, box and coordinates of five dimensions each, the
// swizzle's span, the offset of the box in shared memory.

struct Box {
  int rank, box[5], coordinates[5], offset;
  int64_t sizes[5], strides[5];
  Swizzle swizzle;
  explicit Box(const conformance::Call& call) {
    rank = static_cast<int>(call.number(0));
    for (size_t i = 0; i < 5; ++i) {
      sizes[i] = call.number(1 + i);
      strides[i] = call.number(6 + i);
      box[i] = static_cast<int>(call.number(11 + i));
      coordinates[i] = static_cast<int>(call.number(16 + i));
    }
    swizzle = static_cast<Swizzle>(call.number(21));
    offset = static_cast<int>(call.number(22));
  }
  template <class T, int rank>
  TensorMap map(const T* data) const {
    int64_t size[rank], stride[rank];
    int width[rank];
    for (int i = 0; i < rank; ++i) size[i] = sizes[i], stride[i] = strides[i], width[i] = box[i];
    return make_tensor_map<T, rank>(data, size, stride, width, swizzle);
  }
};
struct Coordinates {
  int at[5];
};

// The image of the box in shared memory, which starts zeroed: `bytes` from the aligned base on.
template <int rank>
KERNEL(64)
load_box(const GRID_CONSTANT TensorMap map, Coordinates coordinates, int offset, int box_bytes,
         uint8_t* out, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const auto space = aligned_space();
  const Barrier barrier = start_barrier();
  for (int i = thread_index(); i < bytes; i += block_threads()) space.store(i, uint8_t{0});
  fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    prefetch(map);
    barrier.arrive_expect(box_bytes);
    int at[rank];
    for (int i = 0; i < rank; ++i) at[i] = coordinates.at[i];
    tensor_load(space + offset, map, at, barrier);
  }
  barrier.wait(0);
  for (int i = thread_index(); i < bytes; i += block_threads()) store(out + i, space.load(i));
#endif
}

// Stores (or adds) the image in[0] as a box of the tensor that is the output.
template <int rank, bool add>
KERNEL(64)
store_box(const GRID_CONSTANT TensorMap map, Coordinates coordinates, int offset, const uint8_t* in,
          int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const auto space = aligned_space();
  for (int i = thread_index(); i < bytes; i += block_threads()) space.store(i, load(in + i));
  fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    int at[rank];
    for (int i = 0; i < rank; ++i) at[i] = coordinates.at[i];
    if constexpr (add) {
      tensor_add(map, at, space + offset);
    } else {
      tensor_store(map, at, space + offset);
    }
    bulk_commit();
    bulk_wait_read<0>();
  }
#endif
}

template <class T, int rank>
void run_load_box(const conformance::Call& call, const Box& box) {
  int box_bytes = sizeof(T);
  for (int i = 0; i < rank; ++i) box_bytes *= box.box[i];
  Coordinates at;
  for (int i = 0; i < 5; ++i) at.at[i] = box.coordinates[i];
  const int bytes = static_cast<int>(call.result_bytes);
  LAUNCH(load_box<rank>, 1, 64, static_cast<size_t>(bytes + 2 * kLine), call.stream,
         (box.map<T, rank>(call.input<T>(0))), at, box.offset, box_bytes, call.output<uint8_t>(),
         bytes);
}
// Numbers also: the bytes of the image.
template <class T, int rank, bool add>
void run_store_box(const conformance::Call& call, const Box& box) {
  Coordinates at;
  for (int i = 0; i < 5; ++i) at.at[i] = box.coordinates[i];
  const int bytes = static_cast<int>(call.number(23));
  LAUNCH((store_box<rank, add>), 1, 64, static_cast<size_t>(bytes + 2 * kLine), call.stream,
         (box.map<T, rank>(call.output<T>())), at, box.offset, call.input<uint8_t>(0), bytes);
}

#define EVERY_RANK(function, T, ...)                               \
  const Box box(call);                                             \
  switch (box.rank) {                                              \
    case 1:                                                        \
      return function<T, 1 __VA_OPT__(, ) __VA_ARGS__>(call, box); \
    case 2:                                                        \
      return function<T, 2 __VA_OPT__(, ) __VA_ARGS__>(call, box); \
    case 3:                                                        \
      return function<T, 3 __VA_OPT__(, ) __VA_ARGS__>(call, box); \
    case 4:                                                        \
      return function<T, 4 __VA_OPT__(, ) __VA_ARGS__>(call, box); \
    default:                                                       \
      return function<T, 5 __VA_OPT__(, ) __VA_ARGS__>(call, box); \
  }
CASE(tensor_load_u8){EVERY_RANK(run_load_box, uint8_t)} CASE(tensor_load_u16){
    EVERY_RANK(run_load_box, uint16_t)} CASE(tensor_load_f32){
    EVERY_RANK(run_load_box, float)} CASE(tensor_store_u8){
    EVERY_RANK(run_store_box, uint8_t, false)} CASE(tensor_store_u16){
    EVERY_RANK(run_store_box, uint16_t, false)} CASE(tensor_store_f32){
    EVERY_RANK(run_store_box, float, false)} CASE(tensor_add_f32){
    EVERY_RANK(run_store_box, float, true)} CASE(tensor_add_bf16){
    EVERY_RANK(run_store_box, bf16, true)} CASE(tensor_add_f16){
    EVERY_RANK(run_store_box, f16, true)} CASE(tensor_add_i32) {
  EVERY_RANK(run_store_box, int32_t, true)
}

}  // namespace
}  // namespace warpformer::cuda
