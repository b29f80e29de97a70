// What a CUDA thread can do, as small functions: the only file that knows PTX and intrinsics.
//
// Kernels written with these compile for the GPU and, with TORCH_BPTT_CUDA_ON_HOST, as plain C++,
// where tests/cuda_on_host runs every thread as a fiber. Three rules keep that possible:
//   - kernels start through launch(), never through <<<>>>;
//   - shared memory is shared_memory(), none of it static;
//   - a block is one-dimensional, of whole warps, and functions named warp_* are called by all 32
//     lanes of a warp together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../core/activations.h"
#include "../core/problem.h"

namespace torch_bptt::cuda {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// How a kernel is started. `stream` is a cudaStream_t.
struct Launch {
  Index3 grid{};
  unsigned threads = 32;    // per block
  unsigned cluster = 1;     // blocks along x that run together; grid.x is a multiple of it
  size_t shared_bytes = 0;  // per block
  void* stream = nullptr;
  bool overlap = false;     // may start before the kernel ahead of it in the stream ends; it then
                            // calls wait_for_kernel_before() before it touches what that one writes
  bool whole_grid = false;  // all blocks run at a time, so that they may wait for each other; a
                            // launch that cannot have that is refused
};

// Null: it went well.
using Error = const char*;

// Bytes that move as one, and aligned to that: 4, 8 or 16.
template <int BYTES>
struct alignas(BYTES) Words {
  uint32_t word[BYTES / 4];
};
using Words4 = Words<16>;

constexpr int kWarp = 32;

}  // namespace torch_bptt::cuda

#ifdef TORCH_BPTT_CUDA_ON_HOST
#include <cuda_on_host/device.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#define TORCH_BPTT_DEVICE __device__ __forceinline__
#define TORCH_BPTT_UNROLL _Pragma("unroll")
#define TORCH_BPTT_UNROLL_LITTLE _Pragma("unroll 2")  // where all would take too many registers

namespace torch_bptt::cuda {

// ---- starting kernels ---------------------------------------------------------------------------

inline Error error_of(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: not once more to whoever asks next
  return cudaGetErrorString(status);
}

// Allows a kernel what launch() will ask for beyond the defaults on the current device. Cheap
// enough to be called every time: once for each kernel and device it allows all there is, so that
// no launch on another thread finds less than it needs.
template <class... Parameters>
Error prepare(void (*kernel)(Parameters...), const Launch& how) {
  if (how.shared_bytes <= 48 * 1024 && how.cluster <= 8) return nullptr;
  const auto* function = reinterpret_cast<const void*>(kernel);
  int device = 0, most_shared = 0;
  if (Error error = error_of(cudaGetDevice(&device))) return error;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> prepared;
  const std::lock_guard lock(mutex);
  if (prepared.count({function, device})) return nullptr;
  cudaError_t status =
      cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess)
    status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  if (status == cudaSuccess && how.cluster > 1)
    status = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) prepared.insert({function, device});
  return error_of(status);
}

// The form in which CUDA takes a Launch. `attributes` has room for three, and must outlive it.
inline cudaLaunchConfig_t config_of(const Launch& how, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid.x, how.grid.y, how.grid.z);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (how.overlap) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.whole_grid) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return config;
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  cudaLaunchAttribute attributes[3];
  const cudaLaunchConfig_t config = config_of(how, attributes);
  return error_of(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// How many clusters of such a launch the current device can run at a time.
template <class... Parameters>
Error active_clusters(void (*kernel)(Parameters...), const Launch& how, int* clusters) {
  if (Error error = prepare(kernel, how)) return error;
  cudaLaunchAttribute attributes[3];
  const cudaLaunchConfig_t config = config_of(how, attributes);
  return error_of(cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
}

// Sets `bytes` bytes on the device to zero, in the order of the stream.
inline Error clear(void* data, size_t bytes, void* stream) {
  return error_of(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// A kernel that takes minutes would keep others waiting: the steps of a loop that one runs at most.
constexpr int64_t kMostSteps = 4096;

// ---- who am I -----------------------------------------------------------------------------------

TORCH_BPTT_DEVICE unsigned thread_index() { return threadIdx.x; }
TORCH_BPTT_DEVICE unsigned block_threads() { return blockDim.x; }
TORCH_BPTT_DEVICE Index3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
TORCH_BPTT_DEVICE Index3 grid_blocks() { return {gridDim.x, gridDim.y, gridDim.z}; }
TORCH_BPTT_DEVICE unsigned lane_index() { return threadIdx.x % kWarp; }
TORCH_BPTT_DEVICE unsigned warp_index() { return threadIdx.x / kWarp; }

TORCH_BPTT_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

TORCH_BPTT_DEVICE unsigned shared_address(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}

// The block's shared memory, aligned to 128 bytes; uninitialised. To be called once: the compiler
// keeps where it begins, which it would otherwise ask a special register for at every use.
TORCH_BPTT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char torch_bptt_shared_memory[];
  unsigned address = shared_address(torch_bptt_shared_memory);
  asm volatile("" : "+r"(address));
  return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}

// ---- meeting ------------------------------------------------------------------------------------

TORCH_BPTT_DEVICE void sync_block() { __syncthreads(); }
TORCH_BPTT_DEVICE void warp_sync() { __syncwarp(); }

// Barrier `id` (1 to 15) of `threads` threads, whole warps: for a part of the block.
TORCH_BPTT_DEVICE void sync_part(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// See Launch::overlap. Without it, both do nothing.
TORCH_BPTT_DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
TORCH_BPTT_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class V>
TORCH_BPTT_DEVICE V warp_shuffle_xor(V value, int lanes) {
  return __shfl_xor_sync(~0u, value, lanes);
}

// ---- converting ---------------------------------------------------------------------------------

TORCH_BPTT_DEVICE float widen(float value) { return value; }
TORCH_BPTT_DEVICE double widen(double value) { return value; }
TORCH_BPTT_DEVICE float widen(bfloat16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}
TORCH_BPTT_DEVICE float widen(float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounded to nearest, ties to even: the storage type S of a value.
template <class S>
TORCH_BPTT_DEVICE S narrow(Compute<S> value) {
  if constexpr (sizeof(S) > 2) {
    return value;
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else {
    return {__half_as_ushort(__float2half_rn(value))};
  }
}

// Rounded to the ten bits of mantissa that a tf32 product reads.
TORCH_BPTT_DEVICE uint32_t to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  __trap();
#endif
}

TORCH_BPTT_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
TORCH_BPTT_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// ---- memory -------------------------------------------------------------------------------------

template <int BYTES>
TORCH_BPTT_DEVICE Words<BYTES> load_words(const void* from) {
  return *static_cast<const Words<BYTES>*>(from);
}
template <int BYTES>
TORCH_BPTT_DEVICE void store_words(void* to, const Words<BYTES>& value) {
  *static_cast<Words<BYTES>*>(to) = value;
}
// Reads what other blocks wrote since this kernel began, from the second-level cache: the first one
// may have the line as it was before.
template <class V>
TORCH_BPTT_DEVICE V load_fresh(const V* from) {
  using Same = std::conditional_t<
      sizeof(V) == 2, unsigned short,
      std::conditional_t<sizeof(V) == 4, unsigned,
                         std::conditional_t<sizeof(V) == 8, unsigned long long, uint4>>>;
  static_assert(sizeof(V) == sizeof(Same));
  const Same bits = __ldcg(reinterpret_cast<const Same*>(from));
  V value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Copies BYTES (4, 8 or 16, aligned to that) from global to shared memory, of which the first
// `valid` are read and the others become zero. It is done when wait_copies() says so. Before sm_80
// it is done at once.
template <int BYTES>
TORCH_BPTT_DEVICE void copy_async(void* shared, const void* global, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#if __CUDA_ARCH__ >= 800
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(BYTES), "r"(valid)
                 : "memory");
#else
  auto* to = static_cast<unsigned char*>(shared);
  if (valid == BYTES) {
    if constexpr (BYTES == 16) *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(global);
    if constexpr (BYTES == 8) *reinterpret_cast<uint2*>(to) = *static_cast<const uint2*>(global);
    if constexpr (BYTES == 4)
      *reinterpret_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(global);
  } else {
    for (int i = 0; i < BYTES; ++i)
      to[i] = i < valid ? static_cast<const unsigned char*>(global)[i] : 0;
  }
#endif
}
// Closes a group of this thread's copies.
TORCH_BPTT_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the last PENDING groups are done; other threads see them after a barrier.
template <int PENDING>
TORCH_BPTT_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Has the second-level cache read the line of an address.
TORCH_BPTT_DEVICE void prefetch_line(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// The compiler moves no read across. So no more of them are under way, which take registers, than
// lie between two of these.
TORCH_BPTT_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// ---- a whole grid (Launch::whole_grid) ----------------------------------------------------------
//
// A flag is a number in global memory that only grows, from a clear() ahead of the kernel on.

// Who sees the number sees all that this thread has written before, or has seen written by others
// of its block before a barrier. Letters to other blocks (send) are not among it.
TORCH_BPTT_DEVICE void publish(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Waits until the number is at least `value`. Ten seconds are a fault, as in wait_for_mail().
TORCH_BPTT_DEVICE void wait_for_flag(const uint32_t* flag, uint32_t value) {
  uint64_t start = 0;
  for (unsigned tries = 1;; ++tries) {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    if (now >= value) return;
    if (tries % 1024) continue;
    if (start == 0) start = nanoseconds();
    if (nanoseconds() - start > 10000000000) __trap();
  }
}

// ---- products of a warp -------------------------------------------------------------------------
//
// Fragments are as the PTX manual draws them, with g = lane / 4 and t = lane % 4.
// 16-bit types, m16n8k16: register i of a holds (row g + 8 (i & 1), columns 2t + 8 (i >> 1) and the
// one after), of b (rows 2t + 8 i and the one after, column g).
// tf32, m16n8k8: register i of a holds (row g + 8 (i & 1), column t + 4 (i >> 1)), of b (row t + 4
// i, column g). d[i]: row g + 8 (i >> 1), column 2t + (i & 1).

// d += a b with sums in float32.
template <class S>
TORCH_BPTT_DEVICE void warp_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(S) == 2);
  constexpr bool kBfloat16 = std::is_same_v<S, bfloat16>;
#if __CUDA_ARCH__ >= 800
  if constexpr (kBfloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  if constexpr (kBfloat16) {
    __trap();  // sm_75 has no such product: the plan never comes here
  } else {
    TORCH_BPTT_UNROLL
    for (int half = 0; half < 2; ++half)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
          "{%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

TORCH_BPTT_DEVICE void warp_mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // sm_75 has no such product: the plan never comes here
#endif
}

// Matrix i of 8 x 8 16-bit elements lies at the 8 rows (16 bytes each) that lanes 8 i to 8 i + 7
// point to; register i then holds of it (row g, columns 2t and 2t + 1).
TORCH_BPTT_DEVICE void warp_load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- clusters (sm_90 and later) -----------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define TORCH_BPTT_HAS_CLUSTERS 1
#else
#define TORCH_BPTT_HAS_CLUSTERS 0
#endif

#if TORCH_BPTT_HAS_CLUSTERS

TORCH_BPTT_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster meet; what they wrote before is seen after.
TORCH_BPTT_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A place in the shared memory of another block of the cluster (or the own one).
struct Remote {
  unsigned address;
  TORCH_BPTT_DEVICE Remote operator+(int bytes) const { return {address + bytes}; }
};
// Where the block of that rank has what this block has at `own`.
TORCH_BPTT_DEVICE Remote in_block(unsigned rank, const void* own) {
  Remote remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote.address)
               : "r"(shared_address(own)), "r"(rank));
  return remote;
}

// An mbarrier in shared memory. Its phase ends when all arrivals and all bytes that it was told to
// expect have come; the next one begins at once.
struct Mailbox {
  uint64_t opaque;
};

TORCH_BPTT_DEVICE void init_mailbox(Mailbox* box, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(box)), "r"(arrivals)
               : "memory");
}
// After all init_mailbox() of a thread, before the sync_cluster() that makes them known.
TORCH_BPTT_DEVICE void publish_mailboxes() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival that adds to what the current phase expects.
TORCH_BPTT_DEVICE void arrive_expecting(Mailbox* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(box)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of that parity (0 for the first). Ten seconds are a fault, and end
// the kernel with an error like an assertion: never a hang. It acquires for the block alone: what
// letters bring lies in the block's own shared memory, and nothing else that a sender wrote is read
// because they came. (Acquiring for the cluster would empty the first-level cache at every wait.)
TORCH_BPTT_DEVICE void wait_for_mail(Mailbox* box, unsigned parity) {
  const unsigned address = shared_address(box);
  uint64_t start = 0;
  for (unsigned tries = 1;; ++tries) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    if (done) return;
    if (tries % 1024) continue;
    if (start == 0) start = nanoseconds();
    if (nanoseconds() - start > 10000000000) __trap();
  }
}
// Sends 16 bytes, aligned to as many, into another block's shared memory, and tells its mailbox
// when they have come.
TORCH_BPTT_DEVICE void send(Remote to, const Words4& value, Remote box) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::
          "r"(to.address),
      "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]),
      "r"(box.address)
      : "memory");
}

#endif  // TORCH_BPTT_HAS_CLUSTERS

}  // namespace torch_bptt::cuda

#endif  // TORCH_BPTT_CUDA_ON_HOST

namespace torch_bptt::cuda {

// d += a b of a warp, by the type that a and b are stored in: float is rounded to tf32 already.
template <class S>
TORCH_BPTT_DEVICE void warp_multiply(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  if constexpr (sizeof(S) == 4)
    warp_mma_tf32(d, a, b);
  else
    warp_mma<S>(d, a, b);
}

// a / b for b in [1, 2]: without what a division does for all other numbers, a branch among it, in
// float.
TORCH_BPTT_INLINE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
TORCH_BPTT_INLINE double quotient(double a, double b) { return a / b; }

// What core/activations.h asks for, in float and double: right to a few units in the last place
// over the whole range.
struct DeviceMath {
  static TORCH_BPTT_INLINE float tanh(float z) { return ::tanhf(z); }
  static TORCH_BPTT_INLINE double tanh(double z) { return ::tanh(z); }
  static TORCH_BPTT_INLINE float sigmoid(float z) { return from_exp(z, ::expf(-::fabsf(z))); }
  static TORCH_BPTT_INLINE double sigmoid(double z) { return from_exp(z, ::exp(-::fabs(z))); }

 private:
  template <class C>
  static TORCH_BPTT_INLINE C from_exp(C z, C e) {  // e = exp(-|z|), which cannot overflow
    return quotient(z < 0 ? e : C(1), 1 + e);
  }
};

}  // namespace torch_bptt::cuda
