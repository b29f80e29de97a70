// AVX-512 with products of pairs of bfloat16: Cooper Lake (2020), Sapphire Rapids (2023), Zen 4
// (2022).
#if defined(__x86_64__)
#include "before_target.h"

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define TORCH_BPTT_ISA avx512_bf16
#define TORCH_BPTT_TABLE kAvx512Bf16
#define TORCH_BPTT_BF16_DOT
#define TORCH_BPTT_VECTOR_BYTES 64
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
