// wgmma: a queue per warpgroup. An instruction reads its operands at the last legal moment, the
// wait for its group; until then they are marked as being read, and its accumulators are poisoned.
#include "emulator/wgmma.h"

#include <array>
#include <cstring>
#include <deque>

#include "emulator/layouts.h"
#include "emulator/widen.h"

namespace warpformer::emulator {
namespace {

constexpr int kRows = 64, kThreads = 128;

// The accumulators of a warpgroup while they are in flight.
struct Tile {
  std::array<uint32_t*, kThreads> registers;
  MatrixType type;
  int n, users = 0;
  std::vector<uint32_t> values;  // 64 x n, row by row
};

struct Instruction {
  Wgmma wgmma;
  Where where;
  std::array<std::array<uint32_t, 4>, kThreads> a;  // where A comes in registers
  Tile* tile;
  AsyncOperation* operation;
  int group;
};

struct Warpgroup : ThreadState {
  std::deque<Instruction> queue;
  std::vector<std::unique_ptr<Tile>> tiles;
  std::array<bool, kThreads> fenced{};
  std::array<int, kThreads> commits{};

  void at_exit() override {
    if (!queue.empty())
      fail("wgmma", queue.front().where, "the thread ends without a wgmma_commit and wgmma_wait");
  }
};

Warpgroup& warpgroup() {
  auto& state = thread_state(Family::wgmma, thread_of_warpgroup(0));
  if (!state) state = std::make_unique<Warpgroup>();
  return static_cast<Warpgroup&>(*state);
}
int own_number() { return here().thread % kThreads; }

// ---- Operands in shared memory

struct Operand {
  MatrixDescriptor layout;
  bool mn_major;
  MatrixType type;
  int extent;  // M or N

  int bytes() const { return element_bytes(type); }
  int depth() const { return 32 / bytes(); }
  int per_chunk() const { return 16 / bytes(); }
  // Chunk `c` in the direction of neighbours, line `l` in the other.
  int chunks() const { return mn_major ? extent / per_chunk() : 2; }
  int lines() const { return mn_major ? depth() : extent; }
  uint32_t address(int c, int l) const {
    const int along = c * per_chunk();
    return operand_address(layout, mn_major, bytes(), mn_major ? along : l, mn_major ? l : along);
  }
};

void check_descriptor(const char* name, uint64_t bits, const Operand& operand, Where where) {
  auto refuse = [&](const std::string& what) {
    fail("wgmma", where, std::string("descriptor of ") + name + ": " + what);
  };
  const MatrixDescriptor& d = operand.layout;
  if (bits & 0x3ff1'c000'c000'c000) refuse("bits that mean nothing are set");
  const uint32_t lines = d.span / 16 - 1;  // of 128 bytes, in which a pattern ends
  if (((d.start >> 7) & lines) != (d.base_offset & lines))
    refuse("the start is not where a pattern of the " + std::to_string(d.span) +
           "-byte swizzle begins, or the base offset does not say so");
  const bool plain = d.span == 16;
  const bool several_spans = operand.mn_major && operand.extent * operand.bytes() > int(d.span);
  const bool several_units = operand.mn_major || operand.extent > 8;
  const bool needs_leading = plain || several_spans;
  const bool needs_stride = operand.mn_major && plain ? several_spans : several_units;
  if (needs_leading && d.leading == 0) refuse("the leading offset is 0");
  if (needs_stride && d.stride == 0) refuse("the stride offset is 0");
}

void add_ranges(const Operand& operand, std::vector<Range>& ranges) {
  auto add = [&](uint32_t address) {
    if (!ranges.empty()) {
      Range& last = ranges.back();
      if (last.address + last.bytes == address) {
        last.bytes += 16;
        return;
      }
      if (address + 16 == last.address) {
        last.address = address, last.bytes += 16;
        return;
      }
    }
    ranges.push_back({address, 16});
  };
  if (operand.layout.span == 16) {
    for (int c = 0; c < operand.chunks(); ++c)
      for (int l = 0; l < operand.lines(); ++l) add(operand.address(c, l));
  } else {
    for (int l = 0; l < operand.lines(); ++l)
      for (int c = 0; c < operand.chunks(); ++c) add(operand.address(c, l));
  }
}

// The 16 bytes of a chunk as floats.
template <MatrixType type>
inline void widen_chunk(const void* chunk, float* out) {
  if constexpr (type == MatrixType::s8) {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<const int8_t*>(chunk)[i];
  } else if constexpr (type == MatrixType::tf32) {
    uint32_t words[4];
    std::memcpy(words, chunk, 16);
    for (uint32_t& word : words) word &= 0xffffe000;
    std::memcpy(out, words, 16);
  } else {
    using H8 = uint16_t __attribute__((vector_size(16)));
    store(out, widen<type>(__builtin_convertvector(load<H8>(chunk), U8), 0));
  }
}

// out[i * i_step + k * k_step] of the whole operand.
template <MatrixType type>
inline void gather(const Operand& operand, float* out, int i_step, int k_step) {
  const int along_step = operand.mn_major ? i_step : k_step;
  const int across_step = operand.mn_major ? k_step : i_step;
  constexpr int per_chunk = 16 / element_bytes(type);
  for (int l = 0; l < operand.lines(); ++l) {
    for (int c = 0; c < operand.chunks(); ++c) {
      float chunk[16];
      widen_chunk<type>(shared_at(operand.address(c, l)), chunk);
      float* to = out + l * across_step + c * per_chunk * along_step;
      for (int i = 0; i < per_chunk; ++i) to[i * along_step] = chunk[i];
    }
  }
}

template <MatrixType type>
inline void gather_registers(const Instruction& instruction, float* out, int i_step) {
  constexpr int per_register = 4 / element_bytes(type);
  for (int thread = 0; thread < kThreads; ++thread) {
    const auto registers =
        load<U8>(std::array<uint32_t, 8>{instruction.a[thread][0], instruction.a[thread][1],
                                         instruction.a[thread][2], instruction.a[thread][3]}
                     .data());
    for (int i = 0; i < per_register; ++i) {
      const F8 wide = widen<type>(registers, i);
      for (int r = 0; r < 4; ++r) {
        const Element e = wgmma_a(thread, r * per_register + i, per_register);
        out[e.row * i_step + e.column] = wide[r];
      }
    }
  }
}

// ---- The product: four rows at once, as in mma

template <MatrixType type>
[[gnu::always_inline]] inline void execute(const Instruction& instruction) {
  constexpr bool integer = type == MatrixType::s8;
  constexpr int depth = 32 / element_bytes(type), together = 4;
  const Wgmma& w = instruction.wgmma;
  const int n = w.n;
  static float a[kRows * depth], b[depth * 256];
  if (w.a_registers)
    gather_registers<type>(instruction, a, depth);
  else
    gather<type>({decode(w.a), w.a_mn_major, type, kRows}, a, depth, 1);
  gather<type>({decode(w.b), w.b_mn_major, type, n}, b, 1, n);
  for (int row = 0; row < kRows; row += together) {
    for (int column = 0; column < n; column += 8) {
      uint32_t* d[together];
      F8 sum[together] = {};
      for (int i = 0; i < together; ++i) {
        d[i] = &instruction.tile->values[(row + i) * n + column];
        if (!integer && w.accumulate) sum[i] = load<F8>(d[i]);
      }
      for (int k = 0; k < depth; ++k) {
        const F8 right = load<F8>(&b[k * n + column]);
        for (int i = 0; i < together; ++i) sum[i] += a[(row + i) * depth + k] * right;
      }
      for (int i = 0; i < together; ++i) {
        if constexpr (integer) {
          const U8 product = reinterpret_cast<U8>(__builtin_convertvector(sum[i], I8));
          store(d[i], w.accumulate ? load<U8>(d[i]) + product : product);
        } else {
          store(d[i], sum[i]);
        }
      }
    }
  }
}
FOR_EACH_CPU void execute_bf16(const Instruction& i) { execute<MatrixType::bf16>(i); }
FOR_EACH_CPU void execute_f16(const Instruction& i) { execute<MatrixType::f16>(i); }
FOR_EACH_CPU void execute_tf32(const Instruction& i) { execute<MatrixType::tf32>(i); }
FOR_EACH_CPU void execute_s8(const Instruction& i) { execute<MatrixType::s8>(i); }

void execute_any(const Instruction& instruction) {
  switch (instruction.wgmma.type) {
    case MatrixType::bf16:
      return execute_bf16(instruction);
    case MatrixType::f16:
      return execute_f16(instruction);
    case MatrixType::tf32:
      return execute_tf32(instruction);
    case MatrixType::s8:
      return execute_s8(instruction);
  }
}

// ---- Accumulators

struct Lane {
  Wgmma wgmma;
  Where where;
};

// The tile that these registers are, taken from them and poisoned if it is not in flight already.
Tile* tile_of(Warpgroup& group, Lane* const* lanes) {
  const Wgmma& first = lanes[0]->wgmma;
  for (const auto& tile : group.tiles) {
    if (tile->registers[0] != first.d) continue;
    for (int thread = 0; thread < kThreads; ++thread)
      if (tile->registers[thread] != lanes[thread]->wgmma.d)
        fail("wgmma", lanes[0]->where, "accumulators are in flight in another order",
             thread_of_warpgroup(thread));
    if (tile->n != first.n || tile->type != first.type)
      fail("wgmma", lanes[0]->where, "accumulators are in flight in a wgmma of another shape");
    return tile.get();
  }
  auto tile = std::make_unique<Tile>();
  tile->type = first.type, tile->n = first.n;
  tile->values.resize(static_cast<size_t>(kRows * first.n));
  for (int thread = 0; thread < kThreads; ++thread) {
    uint32_t* registers = static_cast<uint32_t*>(lanes[thread]->wgmma.d);
    tile->registers[thread] = registers;
    for (int i = 0; i < first.n / 2; ++i) {
      const Element e = wgmma_d(thread, i);
      tile->values[e.row * first.n + e.column] = registers[i];
      registers[i] = kInFlight;
    }
  }
  group.tiles.push_back(std::move(tile));
  return group.tiles.back().get();
}

void give_back(Warpgroup& group, Tile* tile, Where where) {
  for (int thread = 0; thread < kThreads; ++thread) {
    uint32_t* registers = tile->registers[thread];
    for (int i = 0; i < tile->n / 2; ++i) {
      if (registers[i] != kInFlight)
        fail("wgmma", where,
             "accumulator " + std::to_string(i) + " was written before its wgmma_wait",
             thread_of_warpgroup(thread));
      const Element e = wgmma_d(thread, i);
      registers[i] = tile->values[e.row * tile->n + e.column];
    }
  }
  std::erase_if(group.tiles, [tile](const auto& t) { return t.get() == tile; });
}

// ---- Collectives

void issue(Lane* const* lanes) {
  Warpgroup& group = warpgroup();
  const Wgmma& first = lanes[0]->wgmma;
  const Where where = lanes[0]->where;
  for (int thread = 0; thread < kThreads; ++thread) {
    const Wgmma& other = lanes[thread]->wgmma;
    auto refuse = [&](const char* what) {
      fail("wgmma", where, what, thread_of_warpgroup(thread));
    };
    if (other.a != first.a)
      refuse("the descriptor of A is not that of the warpgroup's first thread");
    if (other.b != first.b)
      refuse("the descriptor of B is not that of the warpgroup's first thread");
    if (other.accumulate != first.accumulate)
      refuse("`accumulate` is not that of the warpgroup's first thread");
    if (!group.fenced[thread]) refuse("no wgmma_fence() since the last group was committed");
    if (group.commits[thread] != group.commits[0])
      refuse("the thread has made more or fewer wgmma_commit() than the warpgroup's first thread");
  }
  std::vector<Range> reads;
  if (!first.a_registers) {
    const Operand a{decode(first.a), first.a_mn_major, first.type, kRows};
    check_descriptor("A", first.a, a, where);
    add_ranges(a, reads);
  }
  const Operand b{decode(first.b), first.b_mn_major, first.type, first.n};
  check_descriptor("B", first.b, b, where);
  add_ranges(b, reads);
  Tile* tile = tile_of(group, lanes);
  ++tile->users;
  Instruction& instruction =
      group.queue.emplace_back(Instruction{first, where, {}, tile, nullptr, group.commits[0]});
  if (first.a_registers)
    for (int thread = 0; thread < kThreads; ++thread)
      std::memcpy(instruction.a[thread].data(), lanes[thread]->wgmma.a_registers, 16);
  instruction.operation = async_issue("wgmma", where, Proxy::async, std::move(reads), {});
}

struct WaitLane {
  int pending;
  Where where;
};

void retire(WaitLane* const* lanes) {
  Warpgroup& group = warpgroup();
  for (int thread = 0; thread < kThreads; ++thread)
    if (group.commits[thread] != group.commits[0])
      fail("wgmma_wait", lanes[0]->where,
           "the thread has made more or fewer wgmma_commit() than the warpgroup's first thread",
           thread_of_warpgroup(thread));
  if (!group.queue.empty() && group.queue.back().group == group.commits[0])
    fail("wgmma_wait", lanes[0]->where,
         "does not wait for the wgmma at " + to_string(group.queue.back().where) +
             ": wgmma_commit() is missing");
  while (!group.queue.empty() && group.queue.front().group < group.commits[0] - lanes[0]->pending) {
    const Instruction& instruction = group.queue.front();
    execute_any(instruction);
    async_complete(instruction.operation, thread_of_warpgroup(0), kThreads);
    if (--instruction.tile->users == 0) give_back(group, instruction.tile, instruction.where);
    group.queue.pop_front();
  }
}

}  // namespace

void wgmma(const Wgmma& operation, Where where) {
  Lane lane{operation, where};
  warpgroup_collective("wgmma", where, lane, [](auto lanes) { issue(lanes); });
}

void wgmma_fence(Where) { warpgroup().fenced[own_number()] = true; }

void wgmma_commit(Where) {
  Warpgroup& group = warpgroup();
  group.fenced[own_number()] = false;
  ++group.commits[own_number()];
}

void wgmma_wait(int pending, Where where) {
  WaitLane lane{pending, where};
  warpgroup_collective("wgmma_wait", where, lane, [](auto lanes) { retire(lanes); });
}

void set_registers(int count, bool increase, Where where) {
  const char* op = increase ? "increase_registers" : "decrease_registers";
  warpgroup_collective(op, where, count, [](auto) {});
}

}  // namespace warpformer::emulator
