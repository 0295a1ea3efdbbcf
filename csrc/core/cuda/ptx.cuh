// Every primitive that a kernel may use; asm is written in these files and nowhere else.
//   thread.cuh   position, shuffles, votes, barriers of warp and block
//   math.cuh     fast and exact functions, conversions of bf16 and f16
//   memory.cuh   shared and global memory, cp.async
//   atomic.cuh   atomics, acquire and release, waiting on memory
//   barrier.cuh  mbarriers, proxy fences
//   matrix.cuh   ldmatrix, stmatrix, mma
//   bulk.cuh     bulk and tensor copies (sm_90)
//   wgmma.cuh    matrix products of a warp group (sm_90a)
//   reduce.cuh   sums and maxima of warp and block
//   launch.cuh   LAUNCH
#pragma once

#include "core/cuda/atomic.cuh"
#include "core/cuda/barrier.cuh"
#include "core/cuda/bulk.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/matrix.cuh"
#include "core/cuda/memory.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/thread.cuh"
#include "core/cuda/wgmma.cuh"
