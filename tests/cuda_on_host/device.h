// The functions of csrc/cuda/device.h, which includes this file, on fibers.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define TORCH_BPTT_DEVICE inline
#define TORCH_BPTT_UNROLL
#define TORCH_BPTT_UNROLL_LITTLE
#define TORCH_BPTT_HAS_CLUSTERS 1

namespace torch_bptt::cuda {

using host::Where;

// ---- starting kernels ---------------------------------------------------------------------------

// The limits of an H200.
inline Error refusal_of(const Launch& how) {
  if (how.threads == 0 || how.threads > 1024 || how.grid.x == 0 || how.grid.y == 0 ||
      how.grid.z == 0 || how.grid.y > 65535 || how.grid.z > 65535)
    return "invalid configuration argument";
  if (how.threads % kWarp) return "the host runs whole warps only";
  if (how.shared_bytes > 227 * 1024) return "invalid argument: too much shared memory";
  if (how.cluster == 0 || how.cluster > 16 || how.grid.x % how.cluster)
    return "invalid cluster size";
  return nullptr;
}

// Its 132 multiprocessors. Clusters do not cross the parts of the chip, so some places stay empty.
inline size_t resident_clusters(const Launch& how) {
  const size_t by_threads = 2048 / how.threads,
               by_memory = 228 * 1024 / (how.shared_bytes + 1024),  // 1 KiB is the system's
      blocks = std::min({by_threads, by_memory, size_t(32)});
  return how.cluster == 1 ? 132 * blocks : 132 * blocks * 95 / (100 * how.cluster);
}

template <class... Parameters>
Error prepare(void (*)(Parameters...), const Launch& how) {
  return refusal_of(how);
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (Error error = refusal_of(how)) return error;
  const size_t blocks = size_t(how.grid.x) * how.grid.y * how.grid.z;
  if (how.whole_grid && blocks / how.cluster > resident_clusters(how))
    return "too many blocks in cooperative launch";
  if (how.whole_grid && blocks * how.threads > host::kMostThreads)
    return "the host runs no more than 24000 threads at a time";
  auto body = [&] { kernel(Parameters(arguments)...); };
  host::run(
      {{how.grid.x, how.grid.y, how.grid.z},
       how.threads,
       how.cluster,
       how.shared_bytes,
       how.whole_grid},
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
  return nullptr;
}

template <class... Parameters>
Error active_clusters(void (*)(Parameters...), const Launch& how, int* clusters) {
  if (Error error = refusal_of(how)) return error;
  *clusters = int(resident_clusters(how));
  return nullptr;
}

inline Error clear(void* data, size_t bytes, void*) {
  std::memset(data, 0, bytes);
  return nullptr;
}

constexpr int64_t kMostSteps = 16;  // few, so that tests come upon what one launch hands the next

// ---- who am I -----------------------------------------------------------------------------------

inline unsigned thread_index() { return host::place().thread; }
inline unsigned block_threads() { return host::place().block_threads; }
inline Index3 block_index() {
  const auto& block = host::place().block;
  return {block[0], block[1], block[2]};
}
inline Index3 grid_blocks() {
  const auto& grid = host::place().grid;
  return {grid[0], grid[1], grid[2]};
}
inline unsigned lane_index() { return thread_index() % kWarp; }
inline unsigned warp_index() { return thread_index() / kWarp; }
inline uint64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}
inline unsigned char* shared_memory() { return host::shared_memory(); }

// ---- meeting ------------------------------------------------------------------------------------

inline void sync_block(Where where = Where::current()) { host::sync_block(where); }
inline void sync_part(int id, int threads, Where where = Where::current()) {
  host::sync_part(id, threads, where);
}
inline void warp_sync(Where where = Where::current()) {
  host::warp_together("warp_sync", nullptr, [](void* const*) {}, where);
}
inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}

template <class V>
struct Shuffled {
  V value;
  int lanes;
  V result;

  static void combine(void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      auto* lane = static_cast<Shuffled*>(lanes[i]);
      lane->result = static_cast<Shuffled*>(lanes[(i ^ lane->lanes) % kWarp])->value;
    }
  }
};
template <class V>
V warp_shuffle_xor(V value, int lanes, Where where = Where::current()) {
  Shuffled<V> mine{value, lanes, value};
  host::warp_together("warp_shuffle_xor", &mine, Shuffled<V>::combine, where);
  return mine.result;
}

// ---- converting ---------------------------------------------------------------------------------

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float widen(float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const bool finite = magnitude < 0x0f800000;
  // The exponent's bias is 15 here and 127 there; a product with a power of two is exact, for
  // subnormal numbers too.
  const uint32_t bits = finite ? as_bits(as_float(magnitude) * 0x1p112f) : magnitude | 0x7f800000;
  return as_float(bits | uint32_t(value.bits & 0x8000) << 16);
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = as_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float16_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t sign = as_bits(value) >> 16 & 0x8000, magnitude = as_bits(value) & 0x7fffffff;
  uint32_t bits;
  if (magnitude >= 0x477ff000)  // rounds to 65536 or more
    bits = 0x7c00;
  else if (magnitude < 0x38800000)  // subnormal: 0.5 is where a float's last bit is worth as much
    bits = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  else
    bits = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return uint16_t(sign | bits);
}
template <class S>
S narrow(Compute<S> value) {
  if constexpr (sizeof(S) > 2)
    return value;
  else if constexpr (std::is_same_v<S, bfloat16>)
    return {bfloat16_bits(value)};
  else
    return {float16_bits(value)};
}

inline uint32_t to_tf32(float value) {  // to nearest, ties away from zero
  return std::isfinite(value) ? (as_bits(value) + 0x1000) & ~0x1fffu : as_bits(value);
}

// ---- memory -------------------------------------------------------------------------------------

template <int BYTES>
Words<BYTES> load_words(const void* from, Where where = Where::current()) {
  host::check_aligned(from, BYTES, where);
  Words<BYTES> value;
  std::memcpy(&value, from, BYTES);
  return value;
}
template <int BYTES>
void store_words(void* to, const Words<BYTES>& value, Where where = Where::current()) {
  host::check_aligned(to, BYTES, where);
  std::memcpy(to, &value, BYTES);
}
template <class V>
V load_fresh(const V* from, Where where = Where::current()) {
  host::check_aligned(from, sizeof(V), where);
  return *from;
}
template <int BYTES>
void copy_async(void* shared, const void* global, int valid = BYTES,
                Where where = Where::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  host::copy_async(shared, global, BYTES, valid, where);
}
inline void commit_copies() { host::commit_copies(); }
template <int PENDING>
void wait_copies() {
  host::wait_copies(PENDING);
}
// Reads it, so that an address out of bounds is found where sanitizers look for one.
inline void prefetch_line(const void* global) {
  static_cast<void>(*static_cast<const volatile unsigned char*>(global));
}
inline void keep_order() {}

// ---- a whole grid -------------------------------------------------------------------------------

inline void publish(uint32_t* flag, uint32_t value, Where where = Where::current()) {
  host::publish(flag, value, where);
}
inline void wait_for_flag(const uint32_t* flag, uint32_t value, Where where = Where::current()) {
  host::wait_for_flag(flag, value, where);
}

// ---- products of a warp -------------------------------------------------------------------------

// d (16 x 8) += a (16 x K) b (K x 8); a register of a holds PER_REGISTER elements that follow each
// other, of b as many that lie below each other.
template <int K, int PER_REGISTER, class Element>
struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;

  static void combine(void* const* lanes) {
    float a[16][K], b[K][8], sums[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& mine = *static_cast<const Product*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4 * PER_REGISTER;
      for (int e = 0; e < PER_REGISTER; ++e) {
        for (int i = 0; i < 4; ++i)
          a[g + 8 * (i & 1)][t + K / 2 * (i >> 1) + e] = Element::of(mine.a[i], e);
        for (int i = 0; i < 2; ++i) b[t + K / 2 * i + e][g] = Element::of(mine.b[i], e);
      }
      for (int i = 0; i < 4; ++i) sums[g + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)] = mine.d[i];
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < K; ++k)
        for (int n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<const Product*>(lanes[lane])->d[i] =
            sums[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
  }
};

template <class S>
struct HalfOfRegister {
  static float of(uint32_t word, int half) { return widen(S{uint16_t(word >> 16 * half)}); }
};
struct Tf32Register {
  static float of(uint32_t word, int) { return as_float(word & ~0x1fffu); }
};

template <class S>
void warp_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              Where where = Where::current()) {
  static_assert(sizeof(S) == 2);
  using Mine = Product<16, 2, HalfOfRegister<S>>;
  Mine mine{d, a, b};
  host::warp_together("warp_mma", &mine, Mine::combine, where);
}
inline void warp_mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          Where where = Where::current()) {
  using Mine = Product<8, 1, Tf32Register>;
  Mine mine{d, a, b};
  host::warp_together("warp_mma_tf32", &mine, Mine::combine, where);
}

struct Matrices {
  uint32_t* to;
  const void* row;

  static void combine(void* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const auto* row = static_cast<const Matrices*>(lanes[8 * i + lane / 4])->row;
        std::memcpy(static_cast<const Matrices*>(lanes[lane])->to + i,
                    static_cast<const uint32_t*>(row) + lane % 4, 4);
      }
  }
};
inline void warp_load_matrices(uint32_t (&to)[4], const void* row, Where where = Where::current()) {
  host::check_shared(row, 16, where);
  Matrices mine{to, row};
  host::warp_together("warp_load_matrices", &mine, Matrices::combine, where);
}

// ---- clusters -----------------------------------------------------------------------------------

using host::Mailbox;
using host::Remote;

inline unsigned cluster_rank() { return host::place().cluster_rank; }
inline void sync_cluster(Where where = Where::current()) { host::sync_cluster(where); }
inline Remote in_block(unsigned rank, const void* own, Where where = Where::current()) {
  return host::in_block(rank, own, where);
}
inline void init_mailbox(Mailbox* box, int arrivals, Where where = Where::current()) {
  host::init_mailbox(box, arrivals, where);
}
inline void publish_mailboxes() {}
inline void arrive_expecting(Mailbox* box, int bytes, Where where = Where::current()) {
  host::arrive_expecting(box, bytes, where);
}
inline void wait_for_mail(Mailbox* box, unsigned parity, Where where = Where::current()) {
  host::wait_for_mail(box, parity, where);
}
inline void send(Remote to, const Words4& value, Remote box, Where where = Where::current()) {
  host::send(to, &value, sizeof value, box, where);
}

}  // namespace torch_bptt::cuda
