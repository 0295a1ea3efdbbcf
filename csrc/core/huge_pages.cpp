#include "core/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace warpformer {

void advise_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (t.device.type != DeviceType::cpu || !t.contiguous()) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t end = begin + t.numel() * t.item_size();
  // Whole huge pages only, so that no neighbour in memory is touched.
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = end & ~(kPage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace warpformer
