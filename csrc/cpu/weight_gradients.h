// Sums of outer products over the rows of a chunk: dW_hh += du^T p, dW_ih += du^T x, dbias += sum
// of du.
//
// One matrix product each, the rows being the summed index. Both factors are copied to the order
// the register tile reads: p and x into panels, du into groups of kTileRows columns side by side.
#pragma once

#include "matmul.h"

TORCH_BPTT_KERNELS_BEGIN

template <class S>
class WeightGradients {
 public:
  WeightGradients(const BackwardProblem<S>& problem, int64_t chunk_rows, const Parallel& parallel)
      : p(problem),
        s(problem.schedule),
        parallel(parallel),
        tasks(tasks_for(parallel, chunk_rows * p.H * (p.H + p.I), groups())),
        du_groups(wanted() ? chunk_rows * p.H : 0),
        panels_p(p.grad_weight_hh ? Panels<C>::size(chunk_rows, p.H) : 0),
        panels_x(p.grad_weight_ih ? Panels<C>::size(chunk_rows, p.I) : 0),
        rows_p(p.grad_weight_hh ? chunk_rows : 0),
        rows_x(p.grad_weight_ih ? chunk_rows : 0),
        wide_hh(kNarrow<S> && p.grad_weight_hh ? p.H * p.H : 0),
        wide_ih(kNarrow<S> && p.grad_weight_ih ? p.H * p.I : 0),
        bias_sum(p.grad_bias ? p.H : 0),
        bias_total(p.grad_bias ? p.H : 0),
        zeros(p.H) {
    zeros.fill_zero(p.H);
  }

  // Adds the rows of a chunk; du (rows, H).
  void add(const Chunk& chunk, const Compute<S>* du) {
    const int64_t rows = s.offset(chunk.t1) - s.offset(chunk.t0);
    if (p.grad_bias) add_bias(du, rows);
    if (wanted()) {
      list_rows(chunk);
      for_each_task(parallel, tasks, [&](int task) { pack(task, du, rows); });
      for_each_task(parallel, tasks, [&](int task) {
        if (p.grad_weight_hh)
          add_product(task, {panels_p.get(), rows, p.H}, accumulator(wide_hh, p.grad_weight_hh));
        if (p.grad_weight_ih)
          add_product(task, {panels_x.get(), rows, p.I}, accumulator(wide_ih, p.grad_weight_ih));
      });
    }
    first = false;
  }

  // Rounds the sums of the narrow types into the outputs.
  void finish() const {
    if constexpr (kNarrow<S>) {
      if (p.grad_weight_hh) convert_row(wide_hh.get(), p.grad_weight_hh, p.H * p.H);
      if (p.grad_weight_ih) convert_row(wide_ih.get(), p.grad_weight_ih, p.H * p.I);
    }
    if (p.grad_bias) convert_row(bias_total.get(), p.grad_bias, p.H);
  }

 private:
  using C = Compute<S>;

  bool wanted() const { return p.grad_weight_hh || p.grad_weight_ih; }
  int64_t groups() const { return (p.H + kTileRows - 1) / kTileRows; }

  void add_bias(const C* du, int64_t rows) {
    C* sum = bias_sum.get();
    bias_sum.fill_zero(p.H);
    for (int64_t r = 0; r < rows; ++r) {
      for_columns<C>(0, p.H, [&](int64_t j, auto lanes) {
        store(sum + j, load(sum + j, lanes) + load(du + r * p.H + j, lanes), lanes);
      });
    }
    C* total = bias_total.get();
    for_columns<C>(0, p.H, [&](int64_t j, auto lanes) {
      const Vector<C> chunk = load(sum + j, lanes);
      store(total + j, first ? chunk : load(total + j, lanes) + chunk, lanes);
    });
  }

  // The rows of p_t and x_t in the order of du.
  void list_rows(const Chunk& chunk) {
    int64_t r = 0;
    for (int64_t t = chunk.t0; t < chunk.t1; ++t) {
      const int64_t continued = s.rows_continued(t);
      for (int64_t b = 0; b < s.rows_at(t); ++b, ++r) {
        if (p.grad_weight_ih) rows_x.get()[r] = s.row(p.x, t, b);
        if (!p.grad_weight_hh) continue;
        const S* arriving = zeros.get();
        if (s.kept(t, b)) {
          if (b < continued)
            arriving = s.row(p.h, s.before(t), b);
          else if (p.h0.data)
            arriving = p.h0.data + b * p.h0.row;
        }
        rows_p.get()[r] = arriving;
      }
    }
  }

  void pack(int task, const C* du, int64_t rows) {
    const auto pack_panels = [&](const Panels<C>& panels, const S* const* source) {
      for (int64_t k = 0; k < rows; ++k)
        panels.pack_row(k, source[k], panels.count() * task / tasks,
                        panels.count() * (task + 1) / tasks);
    };
    if (p.grad_weight_hh) pack_panels({panels_p.get(), rows, p.H}, rows_p.get());
    if (p.grad_weight_ih) pack_panels({panels_x.get(), rows, p.I}, rows_x.get());
    for (int64_t g = groups() * task / tasks; g < groups() * (task + 1) / tasks; ++g) {
      const int64_t j = g * kTileRows, width = smaller(kTileRows, p.H - j);
      C* group = du_groups.get() + j * rows;
      if (width == kTileRows) {
        for (int64_t k = 0; k < rows; ++k)
          __builtin_memcpy(group + k * kTileRows, du + k * p.H + j, kTileRows * sizeof(C));
      } else {
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t i = 0; i < width; ++i) group[k * width + i] = du[k * p.H + j + i];
      }
    }
  }

  // sum (H, N) += du^T panels, the task's share of the H output rows.
  void add_product(int task, const Panels<C>& panels, C* sum) {
    C* out[kTileRows];
    for (int64_t column = 0; column < panels.count(); ++column) {
      for (int64_t g = groups() * task / tasks; g < groups() * (task + 1) / tasks; ++g) {
        const int64_t j = g * kTileRows, width = smaller(kTileRows, p.H - j);
        for (int64_t i = 0; i < width; ++i) out[i] = sum + (j + i) * panels.N;
        const C* group = du_groups.get() + j * panels.K;
        Tiles<C, Interleaved>::get(width, panels.vectors(column), false)(
            panels.K, &group, panels.panel(column), first ? nullptr : out, out,
            panels.first_column(column), panels.columns(column));
      }
    }
  }

  // float and double are summed in the output itself.
  static C* accumulator(const Buffer<C>& wide, S* output) {
    if constexpr (kNarrow<S>)
      return wide.get();
    else
      return output;
  }

  const BackwardProblem<S>& p;
  const Schedule& s;
  const Parallel& parallel;
  const int tasks;
  Buffer<C> du_groups, panels_p, panels_x;
  Buffer<const S*> rows_p, rows_x;
  Buffer<C> wide_hh, wide_ih, bias_sum, bias_total;
  Buffer<S> zeros;
  bool first = true;
};

TORCH_BPTT_KERNELS_END
