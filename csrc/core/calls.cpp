#include "core/calls.h"

#include "core/check.h"

namespace warpformer {
namespace {

thread_local Calls* current = nullptr;

}  // namespace

Calls* Calls::recording() { return current; }

void Calls::record() {
  if (current) throw InputError("Calls.record: this thread records calls already");
  current = this;
}

void Calls::stop() {
  if (current == this) current = nullptr;
}

}  // namespace warpformer
