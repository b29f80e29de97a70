// Runs one loop on a chosen path, with chosen tiles, from Python (tests/cuda_loop.py) through
// ctypes.
#include <cstdio>
#include <vector>

#include "cuda/cluster_layout.h"
#include "cuda/grid_layout.h"
#include "cuda/paths.h"
#include "cuda_on_host/fibers.h"

using namespace torch_bptt;
using namespace torch_bptt::cuda;

// As the ctypes.Structure there. Rows are dense and contiguous; what is null is absent.
struct Call {
  int64_t pass, activation, tensor, reverse, truncate, gate_given;
  int64_t T, B, H, grid, cluster, clusters, rows, tiles, begin, end, seed;
  double clip;
  const void *weight, *mask, *c, *noise, *bias, *g, *gate, *first, *restart, *g_n;
  const float* alpha;
  const bool* keep;
  void *state, *f, *h_n, *d, *d_exact, *d0, *restart_sum, *carried;
};

GridLayout grid_layout_of(const Call& call, int size) {
  return {call.H, int(call.rows), size, int(call.cluster), call.clusters, int(call.tiles)};
}

template <class S>
const char* run(const Call& call) {
  static char message[4000];
  Loop<S> loop;
  loop.pass = Pass(call.pass);
  loop.schedule.T = call.T;
  loop.schedule.B = call.B;
  loop.schedule.keep = call.keep;
  loop.schedule.reverse = call.reverse;
  loop.schedule.truncate = call.truncate;
  loop.H = call.H;
  loop.activation = Activation(call.activation);
  loop.gate_given = call.gate_given;
  loop.alpha = call.alpha;
  loop.clip = call.clip;
  const auto read = [&](const void* from) {
    return Rows<const S>{static_cast<const S*>(from), call.B * call.H, call.H};
  };
  loop.weight = static_cast<const S*>(call.weight);
  loop.mask = read(call.mask);
  loop.c = static_cast<const Compute<S>*>(call.c);
  loop.noise = read(call.noise);
  loop.bias[0] = static_cast<const S*>(call.bias);
  loop.g = read(call.g);
  loop.gate = read(call.gate);
  loop.first = read(call.first);
  loop.restart = read(call.restart);
  loop.g_n = read(call.g_n);
  const auto write = [&]<class V>(void* to, V*) {
    return Rows<V>{static_cast<V*>(to), call.B * call.H, call.H};
  };
  loop.state = write(call.state, static_cast<S*>(nullptr));
  loop.f = write(call.f, static_cast<S*>(nullptr));
  loop.h_n = static_cast<S*>(call.h_n);
  loop.d = write(call.d, static_cast<S*>(nullptr));
  loop.d_exact = write(call.d_exact, static_cast<Compute<S>*>(nullptr));
  loop.d0 = write(call.d0, static_cast<S*>(nullptr));
  loop.restart_sum = static_cast<Compute<S>*>(call.restart_sum);
  loop.carried = static_cast<Compute<S>*>(call.carried);

  Plan plan;
  plan.arithmetic = call.tensor ? Arithmetic::tensor : Arithmetic::plain;
  plan.cluster = int(call.cluster);
  plan.rows = int(call.rows);
  plan.tile = int(call.tiles);
  plan.blocks = call.cluster * call.clusters;
  const Steps steps{call.begin, call.end < 0 ? loop.steps() : call.end};
  host::set_schedule_seed(uint64_t(call.seed));
  try {
    if (!call.grid) return run_cluster_path(loop, steps, plan, nullptr);
    const GridLayout layout = grid_layout_of(call, sizeof(S));
    if (!layout.fits(227 * 1024)) return "these tiles do not fit";
    // What nobody writes is NaN.
    std::vector<unsigned char> workspace(layout.workspace_bytes() + 256, 0xff);
    const auto begin = reinterpret_cast<uintptr_t>(workspace.data());
    return run_grid_path(loop, steps, plan, reinterpret_cast<void*>((begin + 255) / 256 * 256),
                         nullptr);
  } catch (const host::Fault& fault) {
    std::snprintf(message, sizeof message, "%s", fault.what());
    return message;
  }
}

extern "C" const char* run_float(const Call* call) { return run<float>(*call); }
extern "C" const char* run_bfloat16(const Call* call) { return run<bfloat16>(*call); }
extern "C" const char* run_float16(const Call* call) { return run<float16>(*call); }

// {threads, chunks, shared_bytes, fits}
extern "C" void cluster_layout(int64_t H, int size, int cluster, int rows, int64_t available,
                               int64_t* out) {
  const ClusterLayout l(H, size, cluster, rows);
  out[0] = l.threads, out[1] = l.chunks, out[2] = l.shared_bytes, out[3] = l.fits(available);
}

// {rows that threads finish one after the other, stages, parts, warps of a part, chunks of a part
// in shared memory}
extern "C" void grid_layout(const Call* call, int size, int64_t* out) {
  const GridLayout l = grid_layout_of(*call, size);
  out[0] = ceil_div(l.rows, l.own_step()), out[1] = ceil_div(l.rows, l.stage_rows);
  out[2] = l.parts, out[3] = l.across, out[4] = l.shared_chunks;
}

// {cluster, rows, blocks, threads, shared_bytes}; false: not on this path.
extern "C" bool cluster_plan(int largest_cluster, int dtype, bool tf32, int64_t B, int64_t H,
                             int64_t* out) {
  Task task;
  task.dtype = Dtype(dtype);
  task.tf32 = tf32;
  task.T = 1;
  task.B = B;
  task.H = H;
  Plan found;
  if (!plan_cluster({90, 132, 227 * 1024, largest_cluster}, task, &found)) return false;
  out[0] = found.cluster, out[1] = found.rows, out[2] = found.blocks, out[3] = found.threads;
  out[4] = found.shared_bytes;
  return true;
}
