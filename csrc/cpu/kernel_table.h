// Compiles all kernels for the instruction set of the including file and defines its table; where
// that set only adds a product of bfloat16 to another one, the kernels for bfloat16.
// Included once per file.
#include "backward_loop.h"
#include "forward_loop.h"
#include "tangent_loop.h"

namespace torch_bptt::cpu {

namespace {
template <class S>
constexpr KernelsFor<S> table() {
  return {TORCH_BPTT_ISA::rnn_forward<S>, TORCH_BPTT_ISA::rnn_backward<S>,
          TORCH_BPTT_ISA::adjoint_scan<S>, TORCH_BPTT_ISA::tangent_scan<S>};
}
}  // namespace

#if defined(TORCH_BPTT_BF16_DOT)
extern constexpr KernelsFor<bfloat16> TORCH_BPTT_TABLE = table<bfloat16>();
#else
#define TORCH_BPTT_STRING_(name) #name
#define TORCH_BPTT_STRING(name) TORCH_BPTT_STRING_(name)
extern constexpr Kernels TORCH_BPTT_TABLE = {TORCH_BPTT_STRING(TORCH_BPTT_ISA), table<float>(),
                                             table<double>(), table<bfloat16>(), table<float16>()};
#endif

}  // namespace torch_bptt::cpu
