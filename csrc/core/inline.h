// Small functions that run on either side: inlined on the host, callable from CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define TORCH_BPTT_INLINE __host__ __device__ inline
#else
#define TORCH_BPTT_INLINE __attribute__((always_inline)) inline
#endif
