#include "core/scratch.h"

#include <memory>
#include <new>

namespace warpformer {
namespace {

constexpr std::align_val_t kAlignment{64};
struct Free {
  void operator()(void* p) const { ::operator delete(p, kAlignment); }
};
struct Buffer {
  std::unique_ptr<void, Free> data;
  size_t size = 0;
};

}  // namespace

void* scratch(size_t bytes) {
  thread_local Buffer buffer;
  if (bytes > buffer.size) {
    buffer.data.reset();
    buffer.size = 0;
    buffer.data.reset(::operator new(bytes, kAlignment));
    buffer.size = bytes;
  }
  return buffer.data.get();
}
float* scratch_floats(size_t n) { return static_cast<float*>(scratch(n * sizeof(float))); }

}  // namespace warpformer
