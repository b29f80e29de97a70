// The instructions every processor of the platform has (SSE2 on x86-64, NEON on AArch64).
#include "before_target.h"

#define TORCH_BPTT_ISA baseline
#define TORCH_BPTT_TABLE kBaseline
#define TORCH_BPTT_VECTOR_BYTES 16
#include "kernel_table.h"
