#include "roofline/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {

double roofline(const std::string& limit, int64_t rounds, const Tensor& memory, int64_t executor) {
  constexpr const char* kLimits[] = {"f32", "bf16", "int8", "read", "copy"};
  int index = 0;
  while (index < 5 && limit != kLimits[index]) ++index;
  CHECK(index < 5, limit);
  CHECK_TENSORS(memory);
  CHECK(memory.dtype == DType::u8 && memory.contiguous(), memory);
  CHECK(rounds > 0, rounds);
  double work = 0;
  RooflineParams p{static_cast<Limit>(index), rounds, memory.ptr<char>()};
  p.bytes = memory.numel();
  p.work = &work;
  RUN_CPU_KERNEL(roofline, p, memory, executor);
  return work;
}

void bind_roofline(py::module_& m) {
  m.def("roofline", &roofline, py::arg("limit"), py::arg("rounds"), py::arg("memory"),
        py::arg("executor"), nogil());
}

}  // namespace warpformer
