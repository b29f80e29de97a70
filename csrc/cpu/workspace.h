// Scratch memory of one call, and the team of threads that shares its work.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "simd.h"

TORCH_BPTT_KERNELS_BEGIN

// Uninitialised elements on a cache line boundary. Allocated outside of parallel regions, so that
// running out of memory is an ordinary exception.
template <class C>
class Buffer {
 public:
  // Aligned by hand: glibc's aligned operator new takes several times as long as the plain one.
  explicit Buffer(int64_t count)
      : memory_(count > 0 ? ::operator new(uint64_t(count) * sizeof(C) + kAlignment) : nullptr),
        data_(reinterpret_cast<C*>((uintptr_t(memory_) + kAlignment - 1) & -kAlignment)) {}
  ~Buffer() { ::operator delete(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  C* get() const { return data_; }
  void fill_zero(int64_t count) const { std::memset(data_, 0, uint64_t(count) * sizeof(C)); }

 private:
  static constexpr uintptr_t kAlignment = 64;
  void* memory_;
  C* data_;
};

TORCH_BPTT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TORCH_BPTT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// body(i) for i in [0, tasks), on several threads where there are several.
template <class Body>
void for_each_task(const Parallel& parallel, int tasks, Body body) {
  if (tasks == 1) return body(0);
  parallel.run(tasks, [](void* context, int i) { (*static_cast<Body*>(context))(i); }, &body);
}

// Below this much work (multiply-adds) a second thread costs more than it brings: waking it takes
// about 5 us.
constexpr int64_t kWorkPerTask = 250'000;

// How many tasks `work` is worth, at most one for each of its `units`, the least that fills a tile.
TORCH_BPTT_INLINE int tasks_for(const Parallel& parallel, int64_t work, int64_t units) {
  return int(larger(1, smaller(parallel.threads, smaller(units, work / kWorkPerTask))));
}

// Batch rows [begin, end) of task i, cut so that every task has about the same number of rows over
// all steps. A row's result does not depend on the cut (see matmul.h), so results do not depend on
// the number of threads.
struct RowRange {
  int64_t begin, end;
};
inline RowRange rows_of_task(const Schedule& schedule, int i, int tasks) {
  const auto cut = [&](int k) {
    if (!schedule.lengths || k == 0 || k == tasks) return schedule.B * k / tasks;
    int64_t b = 0;
    for (int64_t sum = 0; sum < schedule.rows() * k / tasks; ++b) sum += schedule.lengths[b];
    return b;
  };
  return {cut(i), cut(i + 1)};
}

// A stretch of steps [t0, t1) with at most `limit` rows, or one step: what is worked on while it is
// in cache.
struct Chunk {
  int64_t t0, t1;
};
inline Chunk chunk_from(const Schedule& s, int64_t t0, int64_t limit) {
  int64_t t1 = t0 + 1;
  while (t1 < s.T && s.offset(t1 + 1) - s.offset(t0) <= limit) ++t1;
  return {t0, t1};
}
inline Chunk chunk_until(const Schedule& s, int64_t t1, int64_t limit) {
  int64_t t0 = t1 - 1;
  while (t0 > 0 && s.offset(t1) - s.offset(t0 - 1) <= limit) --t0;
  return {t0, t1};
}

// Rows a chunk may have: enough for the products over its rows to pay for loading and storing their
// result (256), and more when rows are short, as long as those of x and h together stay within
// about 200 KB of second-level cache.
inline int64_t rows_per_chunk(const Schedule& s, int64_t I, int64_t H) {
  return smaller(larger(s.B, larger(256, 48'000 / (H + I))), larger(s.rows(), 1));
}

TORCH_BPTT_KERNELS_END
