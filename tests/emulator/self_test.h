// For the kernels of the emulator's own tests.
#pragma once

#include "core/module.h"

/// Binds a kernel (const float* in, float* out, bool broken) under its name.
#define PLANT(kernel, grid, threads, shared_bytes)                                               \
  m.def(                                                                                         \
      #kernel,                                                                                   \
      [](Tensor in, Tensor out, bool broken) {                                                   \
        LAUNCH(kernel, grid, threads, shared_bytes, Stream{}, in.ptr<float>(), out.ptr<float>(), \
               broken);                                                                          \
      },                                                                                         \
      nogil())
