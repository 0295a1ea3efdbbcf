#include "roofline/op.h"

#include "core/check.h"
#include "core/isa.h"
#include "core/module.h"

namespace warpformer {

double roofline(const std::string& limit, int64_t rounds, const Tensor& memory, int threads) {
  constexpr const char* kLimits[] = {"f32", "bf16", "int8", "read", "copy"};
  int index = 0;
  while (index < 5 && limit != kLimits[index]) ++index;
  CHECK(index < 5, limit);
  CHECK_TENSORS(memory);
  CHECK_CPU(memory);
  CHECK(memory.dtype == DType::u8 && memory.contiguous(), memory);
  CHECK(rounds > 0 && threads > 0, rounds, threads);
  double work = 0;
  RooflineParams p{static_cast<Limit>(index), rounds, memory.ptr<char>()};
  p.bytes = memory.numel();
  p.threads = threads;
  p.work = &work;
  CPU_KERNEL(roofline)(p);
  return work;
}

void bind_roofline(py::module_& m) {
  m.def("roofline", &roofline, py::arg("limit"), py::arg("rounds"), py::arg("memory"),
        py::arg("threads"), nogil());
}

}  // namespace warpformer
