// Compiles all kernels for the instruction set of the including file and defines its table.
// Included once per file.
#include "backward_loop.h"
#include "forward_loop.h"
#include "linear_loop.h"

namespace torch_bptt::cpu {

namespace {
template <class S>
constexpr KernelsFor<S> table() {
  return {TORCH_BPTT_ISA::rnn_forward<S>, TORCH_BPTT_ISA::rnn_backward<S>,
          TORCH_BPTT_ISA::adjoint_scan<S>, TORCH_BPTT_ISA::tangent_scan<S>};
}
}  // namespace

#define TORCH_BPTT_STRING_(name) #name
#define TORCH_BPTT_STRING(name) TORCH_BPTT_STRING_(name)
extern constexpr Kernels TORCH_BPTT_TABLE = {TORCH_BPTT_STRING(TORCH_BPTT_ISA), table<float>(),
                                             table<double>(), table<bfloat16>(), table<float16>()};

}  // namespace torch_bptt::cpu
