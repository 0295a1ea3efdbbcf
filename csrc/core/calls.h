// Calls of ops that are made again without Python: on the same tensors, whose values have changed.
// What a CUDA graph is to launches, for every device: op.cpp checks and the kernels run as before.
#pragma once

#include <functional>
#include <type_traits>
#include <vector>

#include "core/python.h"

namespace warpformer {

class Calls {
 public:
  /// Has all calls of ops by this thread added, until `stop`.
  void record();
  void stop();
  /// What this thread records into, or null.
  static Calls* recording();

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  /// Keeps a tensor alive whose memory a call has.
  void keep(pybind11::handle tensor) {
    kept_.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor));
  }
  void run() const {
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }

 private:
  std::vector<std::function<void()>> calls_;
  std::vector<pybind11::object> kept_;
};

/// How an op is bound: m.def("linear", op(&linear), ...).
#ifdef WARPFORMER_EMULATED  // where a kernel may touch the tensors of one call alone
template <class F>
F op(F f) {
  return f;
}
#else
template <class... A>
auto op(void (*f)(A...)) {
  return [f](A... args) {
    f(args...);
    if (Calls* calls = Calls::recording())
      calls->add([f, ... kept = std::decay_t<A>(args)] { f(kept...); });
  };
}
#endif

}  // namespace warpformer
