// Scratch memory of one call, and the stretches of steps that fit the cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "arena.h"
#include "simd.h"

TORCH_BPTT_KERNELS_BEGIN

// Uninitialised elements from the thread's arena. Made outside of parallel regions, so that running
// out of memory is an ordinary exception, and destroyed in reverse order.
template <class C>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_(uint64_t(count) * sizeof(C)),
        data_(static_cast<C*>(Arena::of_this_thread().take(bytes_))) {}
  ~Buffer() { Arena::of_this_thread().give(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  C* get() const { return data_; }
  void fill_zero(int64_t count) const { std::memset(data_, 0, uint64_t(count) * sizeof(C)); }

 private:
  const uint64_t bytes_;
  C* const data_;
};

TORCH_BPTT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TORCH_BPTT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
