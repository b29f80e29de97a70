// AVX-512 as in Skylake-SP (2017) and Zen 4 (2022).
#if defined(__x86_64__)
#include "before_target.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define TORCH_BPTT_ISA avx512
#define TORCH_BPTT_TABLE kAvx512
#define TORCH_BPTT_VECTOR_BYTES 64
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
