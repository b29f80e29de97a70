// AVX2 and FMA: Intel since Haswell (2013), AMD since Excavator (2015).
#if defined(__x86_64__)
#include "before_target.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define TORCH_BPTT_ISA avx2
#define TORCH_BPTT_TABLE kAvx2
#define TORCH_BPTT_VECTOR_BYTES 32
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
