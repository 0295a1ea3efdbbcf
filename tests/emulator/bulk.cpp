// Bulk copies. A load lands when the scheduler says so and completes on its mbarrier. A store reads
// shared memory when the scheduler says so, at the latest when its thread waits for that, and
// writes global memory at the last moment: at bulk_wait or when the thread ends.
#include "emulator/bulk.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "emulator/layouts.h"

namespace warpformer::emulator {
namespace {

constexpr uint32_t kBoxAlignment = 128;

// A stretch of shared memory that is one of global memory, or zeros where `global` is null.
struct Piece {
  uint32_t shared;
  char* global;
  uint32_t bytes;
};
using Pieces = std::vector<Piece>;

struct Store {
  const char* op;
  Where where;
  AsyncOperation* operation;  // null once it has read shared memory and that is known
  Pieces pieces;
  std::vector<std::byte> data;  // what it has read
  TensorMap::Element add;       // bytes: it stores
  int element_bytes, group;
};

template <class T>
void add_all(char* to, const std::byte* from, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + i, sizeof(T));
    std::memcpy(&b, from + i, sizeof(T));
    if constexpr (std::is_same_v<T, bf16>) {
      const float sum = std::bit_cast<float>(uint32_t{a.bits} << 16) +
                        std::bit_cast<float>(uint32_t{b.bits} << 16);
      const uint32_t wide = std::bit_cast<uint32_t>(sum);
      a.bits =
          static_cast<uint16_t>(sum != sum ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    } else if constexpr (std::is_same_v<T, int32_t>) {
      a = static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
    } else {
      a = a + b;
    }
    std::memcpy(to + i, &a, sizeof(T));
  }
}

// Bounds and alignment; wakes those who wait for a write.
void check_global(const Store& store) {
  const Access access = store.add == TensorMap::Element::bytes ? Access::write : Access::atomic;
  for (const Piece& piece : store.pieces)
    global_access(access, piece.global, piece.bytes, static_cast<size_t>(store.element_bytes),
                  store.op, store.where);
}

void write_out(const Store& store) {
  check_global(store);
  const std::byte* from = store.data.data();
  for (const Piece& piece : store.pieces) {
    switch (store.add) {
      case TensorMap::Element::bytes:
        std::memcpy(piece.global, from, piece.bytes);
        break;
      case TensorMap::Element::f32:
        add_all<float>(piece.global, from, piece.bytes);
        break;
      case TensorMap::Element::i32:
        add_all<int32_t>(piece.global, from, piece.bytes);
        break;
      case TensorMap::Element::bf16:
        add_all<bf16>(piece.global, from, piece.bytes);
        break;
      case TensorMap::Element::f16:
        add_all<_Float16>(piece.global, from, piece.bytes);
        break;
    }
    from += piece.bytes;
  }
}

// The stores of one thread. They are held by pointer: deliveries refer to them.
struct Stores : ThreadState {
  std::vector<std::unique_ptr<Store>> queue;
  int groups = 0;

  void finish_read(Store& store) {
    if (!store.operation) return;
    async_deliver(store.operation);
    async_complete(store.operation);
    store.operation = nullptr;
  }
  void at_exit() override {
    for (const auto& store : queue) {
      if (store->operation)
        fail(store->operation->op, store->operation->where,
             "the thread ends while the copy may still read shared memory: bulk_wait_read<0>() is "
             "missing");
      write_out(*store);
    }
    queue.clear();
  }
};

Stores& stores() {
  auto& state = thread_state(Family::bulk);
  if (!state) state = std::make_unique<Stores>();
  return static_cast<Stores&>(*state);
}

void issue_store(const char* op, Where where, Pieces pieces, TensorMap::Element add,
                 int element_bytes) {
  Stores& mine = stores();
  std::vector<Range> reads;
  for (const Piece& piece : pieces) reads.push_back({piece.shared, piece.bytes});
  mine.queue.push_back(std::make_unique<Store>(
      Store{op, where, nullptr, std::move(pieces), {}, add, element_bytes, mine.groups}));
  Store* store = mine.queue.back().get();
  check_global(*store);
  AsyncOperation* operation = async_issue(op, where, Proxy::async, std::move(reads), {});
  store->operation = operation;
  async_defer(operation, [store] {
    for (const Piece& piece : store->pieces) {
      const std::byte* from = shared_at(piece.shared);
      store->data.insert(store->data.end(), from, from + piece.bytes);
    }
  });
}

void issue_load(const char* op, Where where, Pieces pieces, std::vector<Range> writes,
                uint32_t barrier, uint32_t bytes) {
  check_barrier(barrier, op, where);
  for (const Piece& piece : pieces)
    if (piece.global) global_access(Access::read, piece.global, piece.bytes, 1, op, where);
  AsyncOperation* operation = async_issue(op, where, Proxy::async, {}, std::move(writes));
  async_defer(operation, [operation, pieces = std::move(pieces), barrier, bytes] {
    for (const Piece& piece : pieces) {
      if (piece.global)
        std::memcpy(shared_at(piece.shared), piece.global, piece.bytes);
      else
        std::memset(shared_at(piece.shared), 0, piece.bytes);
    }
    async_complete_on(operation, barrier, bytes);
  });
}

void check_bytes(const char* op, Where where, uint32_t shared, const void* global, int bytes) {
  if (bytes <= 0 || bytes % 16 != 0)
    fail(op, where, "moves " + std::to_string(bytes) + " bytes, which is no multiple of 16");
  if (shared % 16 != 0)
    fail(op, where, "the address in shared memory is misaligned: a multiple of 16 is needed");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail(op, where, "the address in global memory is misaligned: a multiple of 16 is needed");
}

// Adds a piece, to the last one if it goes on from there.
void append(Pieces& pieces, const Piece& piece) {
  if (!pieces.empty()) {
    Piece& last = pieces.back();
    const bool goes_on =
        piece.global ? last.global && last.global + last.bytes == piece.global : !last.global;
    if (goes_on && last.shared + last.bytes == piece.shared) {
      last.bytes += piece.bytes;
      return;
    }
  }
  pieces.push_back(piece);
}

// The box at `coordinates`, chunk by chunk (the unit of a swizzle), as pieces of shared memory and,
// in the tensor, of global memory; all of them, or those in the tensor alone.
Pieces box_pieces(const TensorMap& map, const int* coordinates, uint32_t shared, bool inside_only) {
  Pieces pieces;
  const uint32_t pitch = static_cast<uint32_t>(map.box[0]) * map.element_bytes;
  uint32_t lines = 1;
  for (int d = 1; d < map.rank; ++d) lines *= static_cast<uint32_t>(map.box[d]);
  for (uint32_t line = 0; line < lines; ++line) {
    char* row = map.data;
    bool inside = true;
    for (uint32_t d = 1, rest = line; d < map.rank; ++d) {
      const int64_t x =
          coordinates[d] + static_cast<int64_t>(rest % static_cast<uint32_t>(map.box[d]));
      rest /= static_cast<uint32_t>(map.box[d]);
      inside = inside && x >= 0 && x < map.sizes[d];
      row += x * map.strides[d];
    }
    for (uint32_t chunk = 0; chunk < pitch; chunk += 16) {
      // The chunk's elements that lie in the tensor: [first, last) of the row's bytes.
      const int64_t begin = static_cast<int64_t>(coordinates[0]) * map.element_bytes + chunk;
      const int64_t end = map.sizes[0] * map.element_bytes;
      const int64_t first = std::clamp<int64_t>(0, begin, begin + 16);
      const int64_t last = inside ? std::clamp<int64_t>(end, first, begin + 16) : first;
      const uint32_t at = box_address(shared, line, chunk, pitch, map.span);
      auto add = [&](int64_t from, int64_t to, bool zeros) {
        if (from < to && !(zeros && inside_only))
          append(pieces, {at + static_cast<uint32_t>(from - begin), zeros ? nullptr : row + from,
                          static_cast<uint32_t>(to - from)});
      };
      add(begin, first, true);
      add(first, last, false);
      add(last, begin + 16, true);
    }
  }
  return pieces;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) bytes *= static_cast<uint32_t>(map.box[d]);
  return bytes;
}

void check_box(const char* op, Where where, const TensorMap& map, int rank, uint32_t shared) {
  if (map.rank != rank)
    fail(op, where,
         std::to_string(rank) + " coordinates for a tensor map of " + std::to_string(map.rank) +
             " dimensions");
  if (shared % kBoxAlignment != 0)
    fail(op, where, "the box in shared memory is misaligned: a multiple of 128 is needed");
}

}  // namespace

void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier, Where where) {
  check_bytes("bulk_load", where, to, from, bytes);
  const auto size = static_cast<uint32_t>(bytes);
  issue_load("bulk_load", where, {{to, static_cast<char*>(const_cast<void*>(from)), size}},
             {{to, size}}, barrier, size);
}

void bulk_store(void* to, uint32_t from, int bytes, Where where) {
  check_bytes("bulk_store", where, from, to, bytes);
  issue_store("bulk_store", where, {{from, static_cast<char*>(to), static_cast<uint32_t>(bytes)}},
              TensorMap::Element::bytes, 16);
}

void bulk_add(void* to, uint32_t from, int bytes, TensorMap::Element element, Where where) {
  check_bytes("bulk_add", where, from, to, bytes);
  issue_store("bulk_add", where, {{from, static_cast<char*>(to), static_cast<uint32_t>(bytes)}},
              element, 16);
}

void tensor_load(uint32_t to, const TensorMap& map, const int* coordinates, int rank,
                 uint32_t barrier, Where where) {
  check_box("tensor_load", where, map, rank, to);
  issue_load("tensor_load", where, box_pieces(map, coordinates, to, false), {{to, box_bytes(map)}},
             barrier, box_bytes(map));
}

void tensor_store(const TensorMap& map, const int* coordinates, int rank, uint32_t from, bool add,
                  Where where) {
  const char* op = add ? "tensor_add" : "tensor_store";
  check_box(op, where, map, rank, from);
  if (add && map.element == TensorMap::Element::bytes)
    fail(op, where, "the tensor map is of none of float, int32_t, bf16 and f16");
  issue_store(op, where, box_pieces(map, coordinates, from, true),
              add ? map.element : TensorMap::Element::bytes, map.element_bytes);
}

void bulk_commit(Where) { ++stores().groups; }

void bulk_wait(int pending, bool read_only, Where) {
  Stores& mine = stores();
  for (const auto& store : mine.queue) {
    if (store->group >= mine.groups - pending) break;
    mine.finish_read(*store);
    if (!read_only) write_out(*store);
  }
  if (!read_only)
    std::erase_if(mine.queue, [&](const auto& s) { return s->group < mine.groups - pending; });
}

}  // namespace warpformer::emulator
