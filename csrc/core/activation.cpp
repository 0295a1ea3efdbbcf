#include "core/activation.h"

#include <string.h>

namespace warpformer {

bool is_activation(const char* name, Activation& activation) {
  constexpr const char* kNames[] = {"none", "relu", "relu2", "silu", "tanh", "gelu", "gelu_tanh"};
  int i = 0;
  for (const char* known : kNames) {
    activation = static_cast<Activation>(i++);
    if (!strcmp(name, known)) return true;
  }
  return false;
}

}  // namespace warpformer
