// The C interface of the cases, for ctypes. Arrays come and go in host memory.
#include <cstring>
#include <exception>
#include <stdexcept>

#include "conformance/case.h"

namespace warpformer::conformance {
namespace {

#ifdef WARPFORMER_EMULATED

// Kernels may touch the arrays of the call, and only while it lasts.
struct Memory {
  emulator::Call call;
  const void* input(const void* host, int64_t bytes) {
    emulator::register_global(host, static_cast<size_t>(bytes));
    return host;
  }
  void* output(void* host, int64_t bytes) {
    emulator::register_global(host, static_cast<size_t>(bytes));
    return host;
  }
  void finish() {}
};

#else

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Memory {
  std::vector<void*> device;
  void* result = nullptr;
  void* host = nullptr;
  int64_t bytes = 0;

  void* copy(const void* from, int64_t size) {
    void* to = nullptr;
    check(cudaMalloc(&to, static_cast<size_t>(size) + 1));
    device.push_back(to);
    check(cudaMemcpy(to, from, static_cast<size_t>(size), cudaMemcpyHostToDevice));
    return to;
  }
  const void* input(const void* from, int64_t size) { return copy(from, size); }
  void* output(void* to, int64_t size) {
    host = to, bytes = size;
    return result = copy(to, size);
  }
  void finish() {
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(host, result, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
  }
  ~Memory() {
    for (void* p : device) cudaFree(p);
  }
};

#endif

}  // namespace
}  // namespace warpformer::conformance

#define EXPORT extern "C" __attribute__((visibility("default")))

/// Runs a case; the output holds what it should start with. Returns 0, or 1 and the message.
EXPORT int conformance_run(const char* name, int inputs, const void* const* input,
                           const int64_t* input_bytes, void* output, int64_t output_bytes,
                           int numbers, const int64_t* number, char* message,
                           int64_t message_bytes) {
  using namespace warpformer::conformance;
  try {
    const auto found = cases().find(name);
    if (found == cases().end()) throw std::invalid_argument(std::string("no case ") + name);
    Memory memory;
    Call call;
    for (int i = 0; i < inputs; ++i) call.inputs.push_back(memory.input(input[i], input_bytes[i]));
    call.result = memory.output(output, output_bytes);
    call.result_bytes = output_bytes;
    call.numbers.assign(number, number + numbers);
    found->second(call);
    memory.finish();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), static_cast<size_t>(message_bytes) - 1);
    message[message_bytes - 1] = 0;
    return 1;
  }
}

/// The names of all cases, one a line.
EXPORT const char* conformance_cases() {
  static const std::string names = [] {
    std::string all;
    for (const auto& [name, function] : warpformer::conformance::cases()) all += name + "\n";
    return all;
  }();
  return names.c_str();
}

#ifdef WARPFORMER_EMULATED
EXPORT void conformance_set_schedule(const char* schedule) {
  warpformer::emulator::set_schedule(schedule);
}
#endif
