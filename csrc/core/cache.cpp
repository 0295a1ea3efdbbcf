#include "core/cache.h"

#include <algorithm>
#include <cstdio>
#include <string>

namespace warpformer {
namespace {

/// Bytes of the largest cache that the first CPU sees, 0 where the system does not tell. Not from
/// sysconf, which takes all caches of a socket for one.
int64_t largest_cache() {
  long long largest = 0;
  for (int i = 0; i < 10; ++i) {
    const std::string path =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size";
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (!file) continue;
    long long kibibytes = 0;
    if (std::fscanf(file, "%lldK", &kibibytes) == 1) largest = std::max(largest, kibibytes);
    std::fclose(file);
  }
  return largest * 1024;
}

}  // namespace

bool is_past_cache(int64_t bytes) {
  static const int64_t size = largest_cache();
  return size > 0 && bytes >= size;
}

}  // namespace warpformer
