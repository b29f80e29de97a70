// What the rest of the library calls. Everything runs on the given stream (a cudaStream_t) of the
// current device, allocates nothing and waits for nothing, so that a CUDA graph can hold it.
#pragma once

#include "loops.h"
#include "plan.h"

namespace torch_bptt::cuda {

// Null, or what went wrong.
using Error = const char*;

// ---- the paths: each runs some steps of a loop (plan.h) -----------------------------------------

template <class S>
Error run_step_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream);
template <class S>
Error run_block_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream);
// Not float64.
template <class S>
Error run_cluster_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* stream);
// Not float64. The workspace has plan.workspace_bytes, aligned to 256.
template <class S>
Error run_grid_path(const Loop<S>& loop, Steps steps, const Plan& plan, void* workspace,
                    void* stream);

// For devices with clusters: of how many blocks the largest is that the current device can run, as
// path cluster launches it with so much shared memory a block; 0: of none.
int largest_cluster(int64_t shared_bytes);
// And how many clusters of a size run at the same time, as path grid launches them; 0: none.
int whole_grid_clusters(int cluster, int64_t shared_bytes);

// Path gemm, around the product of step i, which is a library's and lies in rows of H
// (gemm_path.cu): `to` becomes what it multiplies by the weight, for the first `rows` rows; and its
// result finishes the elements of all rows of the step, StepRows::rows() on the host. No product is
// read where nothing enters.
template <class S>
Error gather_step(const Loop<S>& loop, int64_t i, int64_t rows, S* to, void* stream);
template <class S>
Error finish_step(const Loop<S>& loop, int64_t i, int64_t rows, const Compute<S>* products,
                  void* stream);

// ---- around the loops (rows.cu) -----------------------------------------------------------------

// Writes numbers of the host to the device. They travel as kernel arguments: a copy from ordinary
// memory would wait, and could not be captured.
Error store_numbers(const int64_t* numbers, int64_t count, int64_t* to, void* stream);

// What was multiplied by W_hh at each step, rows of H in memory order, for the gradient of W_hh.
// The loop is that of forward.
template <class S>
Error entering_rows(const Loop<S>& loop, S* to, void* stream);

// Sums over rows of d (f - p) for each unit, the gradient of alpha, of each part of the batch
// (core/problem.h): groups of steps by parts by H, the groups still to be added up. d has rows of H
// in memory order; the loop is that of forward.
int64_t alpha_sum_groups(const Schedule& schedule);
template <class S>
Error alpha_sums(const Loop<S>& loop, const Compute<S>* d, int64_t parts, Compute<S>* sums,
                 void* stream);

// |d| of each row of H.
template <class C>
Error row_norms(const C* d, int64_t rows, int64_t H, C* norms, void* stream);

}  // namespace torch_bptt::cuda
