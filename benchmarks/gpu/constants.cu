// Latencies and limits of the device that decide how a recurrence should be spread over it.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a constants.cu -o constants
//     ./constants [seconds]
//
// Prints rows of CSV, each as soon as it is measured: what, the parameters, value, unit. A value
// that could not be had is empty and the last column says why. Nothing here waits for ever: waits
// for another block end after two seconds and set an error. Needs compute capability 9.0.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

constexpr int THREADS = 256;
constexpr int SHARED_LIMIT = 200 * 1024;
constexpr int REPEATS = 9;

// ---- rows
// ----------------------------------------------------------------------------------------

std::chrono::steady_clock::time_point begin;
double seconds_given = 120;

bool time_is_left() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() <
         seconds_given;
}

void row(const char* what, const std::string& parameters, double value, const char* unit) {
  std::printf("%s,%s,%.6g,%s,\n", what, parameters.c_str(), value, unit);
  std::fflush(stdout);
}

void missing(const char* what, const std::string& parameters, const char* why) {
  std::printf("%s,%s,,,%s\n", what, parameters.c_str(), why);
  std::fflush(stdout);
}

// Ends the program: after an error of the device no later number means anything.
void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  missing(what, "", cudaGetErrorString(status));
  std::exit(1);
}
#define MUST(call) must((call), #call)

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// ---- what a thread can do
// ------------------------------------------------------------------------

__device__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ void push(uint32_t to, uint4 value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

__device__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ bool passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

__device__ uint32_t load_acquire(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}
__device__ void store_release(uint32_t* pointer, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
__device__ void add_release(uint32_t* pointer, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// 16 bytes that arrive all at once or not at all.
__device__ ulonglong2 load_packet(const ulonglong2* pointer) {
  ulonglong2 value;
  asm volatile("{\n.reg .b128 q;\nld.relaxed.gpu.global.b128 q, [%2];\nmov.b128 {%0, %1}, q;\n}"
               : "=l"(value.x), "=l"(value.y)
               : "l"(pointer)
               : "memory");
  return value;
}
__device__ void store_packet(ulonglong2* pointer, ulonglong2 value) {
  asm volatile(
      "{\n.reg .b128 q;\nmov.b128 q, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], q;\n}" ::"l"(
          pointer),
      "l"(value.x), "l"(value.y)
      : "memory");
}

// A wait that gives up after two seconds, and lets every later one give up at once.
struct Patience {
  uint32_t* failed;
  uint64_t until;
  int polls = 0;
  bool gone = false;

  __device__ explicit Patience(uint32_t* failed)
      : failed(failed), until(nanoseconds() + 2000000000) {}
  __device__ bool lost() {
    if (gone || ++polls % 1024) return gone;
    if (nanoseconds() > until) atomicExch(failed, 1u);
    return gone = *static_cast<volatile uint32_t*>(failed) != 0;
  }
};

// ---- kernels
// -------------------------------------------------------------------------------------

__global__ void empty_kernel() {}

__global__ void dependent_kernel() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__global__ void __launch_bounds__(THREADS, 1) cluster_sync_kernel(int rounds, uint64_t* took) {
  sync_cluster();
  const uint64_t start = nanoseconds();
  for (int i = 0; i < rounds; ++i) sync_cluster();
  const uint64_t end = nanoseconds();
  if (threadIdx.x == 0) took[blockIdx.x] = end - start;
}

__global__ void __launch_bounds__(THREADS, 1) block_sync_kernel(int rounds, uint64_t* took) {
  const uint64_t start = nanoseconds();
  for (int i = 0; i < rounds; ++i) __syncthreads();
  const uint64_t end = nanoseconds();
  if (threadIdx.x == 0) took[blockIdx.x] = end - start;
}

// Every block of a cluster pushes its slice of `slice` bytes into every block, itself too, and goes
// on when it has all of them: what a step of a recurrence does whose state is spread over the
// cluster. Two buffers, two barriers: whoever passes the barrier of a round knows that everyone has
// sent that round, and therefore has read the one before, whose buffer the next round fills.
__global__ void __launch_bounds__(THREADS, 1)
    push_kernel(int rounds, int blocks, int slice, uint64_t* took, uint32_t* failed) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[2];
  const uint32_t rank = cluster_rank(), whole = uint32_t(blocks) * slice;
  const int pieces = slice / 16;
  if (threadIdx.x == 0) {
    for (auto& barrier : barriers)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();
  Patience patience(failed);
  bool lost = false;
  const uint64_t start = nanoseconds();
  for (int i = 0; i < rounds && !lost; ++i) {
    const uint32_t barrier = shared_address(&barriers[i % 2]), parity = (i / 2) % 2;
    const uint32_t buffer = shared_address(memory) + (i % 2) * whole;
    if (threadIdx.x == 0) expect(barrier, whole);
    for (int p = threadIdx.x; p < pieces * blocks; p += THREADS) {
      const uint32_t peer = p / pieces, piece = p % pieces;
      const uint4 value = {uint32_t(i), rank, piece, 1};
      push(peer_address(buffer + rank * slice + piece * 16, peer), value,
           peer_address(barrier, peer));
    }
    while (!passed(barrier, parity) && !(lost = patience.lost())) {
    }
    // All that came is looked at, as a product would read it.
    bool right = true;
    for (int p = threadIdx.x; p < pieces * blocks; p += THREADS) {
      const auto* got = reinterpret_cast<const uint4*>(memory + (i % 2) * whole) + p;
      right &= got->x == uint32_t(i) && got->y == uint32_t(p / pieces);
    }
    if (!right) atomicExch(failed, 2u);
    __syncthreads();
  }
  const uint64_t end = nanoseconds();
  sync_cluster();  // nobody leaves while another may still write here
  if (threadIdx.x == 0) took[blockIdx.x] = end - start;
}

enum Hop { COUNTER, FLAGS, PACKETS };

// Every block publishes `words` packets of 12 bytes through the second-level cache and goes on when
// it has those of all blocks. COUNTER and FLAGS send plain data and then say so; PACKETS carry the
// round in themselves.
__global__ void __launch_bounds__(THREADS, 1)
    hop_kernel(Hop hop, int rounds, int words, uint32_t* flags, uint4* plain, ulonglong2* packets,
               uint64_t* took, uint32_t* failed) {
  const int blocks = gridDim.x, mine = blockIdx.x;
  __shared__ int wrong;
  if (threadIdx.x == 0) wrong = 0;
  cooperative_groups::this_grid().sync();
  Patience patience(failed);
  bool lost = false;
  const uint64_t start = nanoseconds();
  for (int i = 0; i < rounds && !lost; ++i) {
    const uint32_t round = i + 1;
    const int64_t slot = int64_t(i % 2) * blocks * words;
    if (hop == PACKETS) {
      for (int w = threadIdx.x; w < words; w += THREADS)
        store_packet(packets + slot + int64_t(mine) * words + w,
                     {(uint64_t(w) << 32) | round, uint64_t(mine)});
      for (int w = threadIdx.x; w < words * blocks; w += THREADS) {
        ulonglong2 got;
        do got = load_packet(packets + slot + w);
        while (uint32_t(got.x) != round && !(lost = patience.lost()));
        if (got.y != uint64_t(w / words)) atomicExch(&wrong, 1);
      }
      __syncthreads();
    } else {
      for (int w = threadIdx.x; w < words; w += THREADS)
        plain[slot + int64_t(mine) * words + w] = {round, uint32_t(w), uint32_t(mine), 0};
      __syncthreads();
      if (hop == COUNTER) {
        if (threadIdx.x == 0) {
          add_release(flags, 1);
          while (load_acquire(flags) < round * blocks && !(lost = patience.lost())) {
          }
        }
      } else {
        if (threadIdx.x == 0) store_release(flags + 32 * mine, round);
        if (threadIdx.x < 32)
          for (int b = threadIdx.x; b < blocks; b += 32)
            while (load_acquire(flags + 32 * b) < round && !(lost = patience.lost())) {
            }
      }
      lost = __syncthreads_or(lost);
      for (int w = threadIdx.x; w < words * blocks; w += THREADS)
        if (__ldcg(&plain[slot + w].x) != round) atomicExch(&wrong, 1);
    }
    // One word tells all threads to leave together: some may have given up while others have not.
    lost = __syncthreads_or(lost);
  }
  const uint64_t end = nanoseconds();
  __syncthreads();
  if (threadIdx.x == 0 && wrong && !*failed) atomicExch(failed, 2u);
  if (threadIdx.x == 0) took[blockIdx.x] = end - start;
}

__global__ void __launch_bounds__(THREADS, 1) grid_sync_kernel(int rounds, uint64_t* took) {
  auto grid = cooperative_groups::this_grid();
  grid.sync();
  const uint64_t start = nanoseconds();
  for (int i = 0; i < rounds; ++i) grid.sync();
  const uint64_t end = nanoseconds();
  if (threadIdx.x == 0) took[blockIdx.x] = end - start;
}

// The product of a step of a recurrence whose weights stay in registers: eight warps, each with 16
// rows of the weights and TILES times 16 of their columns; the state is NARROW times 8 batch rows
// in shared memory, read with ldmatrix. Half of the warps have the other half of the columns, and
// the sums meet in shared memory.
template <int TILES, int NARROW>
__global__ void __launch_bounds__(THREADS, 1)
    product_kernel(int rounds, const uint32_t* weights, float* result, uint64_t* cycles) {
  constexpr int K = 2 * TILES * 16, STRIDE = K + 8;  // 16 bytes more: no two rows in one bank
  extern __shared__ __align__(16) unsigned char memory[];
  auto* state = reinterpret_cast<__nv_bfloat16*>(memory);
  auto* sums = reinterpret_cast<float*>(memory + NARROW * 8 * STRIDE * 2);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = warp / 4, rows = warp % 4;
  uint32_t a[TILES][4];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int r = 0; r < 4; ++r) a[t][r] = weights[(t * 4 + r) * THREADS + threadIdx.x];
  for (int i = threadIdx.x; i < NARROW * 8 * STRIDE; i += THREADS)
    state[i] = __float2bfloat16(0.01f * (i % 17) - 0.08f);
  __syncthreads();
  const int64_t start = clock64();
  for (int i = 0; i < rounds; ++i) {
    float4 own[NARROW];
#pragma unroll
    for (int n = 0; n < NARROW; ++n) {
      float chains[4][4] = {};
#pragma unroll
      for (int t = 0; t < TILES; t += 2) {
        uint32_t b[4];
        const __nv_bfloat16* from =
            state + (n * 8 + lane % 8) * STRIDE + half * TILES * 16 + t * 16 + lane / 8 * 8;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(shared_address(from))
                     : "memory");
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float (&c)[4] = chains[(t + u) % 4];
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
              "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
              : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
              : "r"(a[t + u][0]), "r"(a[t + u][1]), "r"(a[t + u][2]), "r"(a[t + u][3]),
                "r"(b[2 * u]), "r"(b[2 * u + 1]));
        }
      }
      own[n].x = (chains[0][0] + chains[1][0]) + (chains[2][0] + chains[3][0]);
      own[n].y = (chains[0][1] + chains[1][1]) + (chains[2][1] + chains[3][1]);
      own[n].z = (chains[0][2] + chains[1][2]) + (chains[2][2] + chains[3][2]);
      own[n].w = (chains[0][3] + chains[1][3]) + (chains[2][3] + chains[3][3]);
    }
    auto* meeting = reinterpret_cast<float4*>(sums) + rows * 32 + lane;
#pragma unroll
    for (int n = 0; n < NARROW; ++n)
      if (half == 1) meeting[n * 4 * 32] = own[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NARROW; ++n)
      if (half == 0) {
        const float4 other = meeting[n * 4 * 32];
        __nv_bfloat16* to = state + (n * 8 + lane % 4 * 2) * STRIDE + rows * 16 + lane / 4;
        to[0] = __float2bfloat16(tanhf(own[n].x + other.x));
        to[STRIDE] = __float2bfloat16(tanhf(own[n].y + other.y));
        to[8] = __float2bfloat16(tanhf(own[n].z + other.z));
        to[STRIDE + 8] = __float2bfloat16(tanhf(own[n].w + other.w));
      }
    __syncthreads();
  }
  const int64_t end = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - start;
  result[blockIdx.x * THREADS + threadIdx.x] = __bfloat162float(state[threadIdx.x]);
}

// ---- launches
// ------------------------------------------------------------------------------------

struct Memory {
  uint64_t* took;
  uint32_t *failed, *flags, *weights;
  uint4* plain;
  ulonglong2* packets;
  float* result;
  int processors;

  static constexpr int64_t SLOTS = 2 * 132 * 64, WEIGHTS = 32 * 4 * THREADS;

  Memory() {
    cudaDeviceProp device;
    MUST(cudaGetDeviceProperties(&device, 0));
    processors = std::min(device.multiProcessorCount, 132);
    row("device", device.name, device.multiProcessorCount, "multiprocessors");
    row("capability", "", device.major * 10 + device.minor, "");
    row("shared memory per block", "opt-in", double(device.sharedMemPerBlockOptin), "bytes");
    row("second-level cache", "", double(device.l2CacheSize), "bytes");
    if (device.major < 9) {
      missing("all", "", "needs compute capability 9.0");
      std::exit(1);
    }
    MUST(cudaMalloc(&took, 1024 * sizeof *took));
    MUST(cudaMalloc(&failed, sizeof *failed));
    MUST(cudaMalloc(&flags, 32 * 132 * sizeof *flags));
    MUST(cudaMalloc(&weights, WEIGHTS * sizeof *weights));
    MUST(cudaMalloc(&plain, SLOTS * sizeof *plain));
    MUST(cudaMalloc(&packets, SLOTS * sizeof *packets));
    MUST(cudaMalloc(&result, 132 * THREADS * sizeof *result));
    std::vector<uint32_t> pairs(WEIGHTS);  // of bfloat16 numbers of about +-0.02
    for (size_t i = 0; i < pairs.size(); ++i) {
      const uint32_t low = 0x3c80 + i % 64, high = 0xbc80 + (i * 7) % 64;
      pairs[i] = low | high << 16;
    }
    MUST(cudaMemcpy(weights, pairs.data(), pairs.size() * 4, cudaMemcpyHostToDevice));
  }

  void clear() {
    MUST(cudaMemset(failed, 0, sizeof *failed));
    MUST(cudaMemset(flags, 0, 32 * 132 * sizeof *flags));
    MUST(cudaMemset(packets, 0, SLOTS * sizeof *packets));
    MUST(cudaMemset(plain, 0, SLOTS * sizeof *plain));
  }

  // The longest of the blocks' times; negative, with a row that says why, if a wait was given up.
  double longest(const char* what, const std::string& parameters, int blocks) {
    MUST(cudaDeviceSynchronize());
    uint32_t error;
    MUST(cudaMemcpy(&error, failed, sizeof error, cudaMemcpyDeviceToHost));
    if (error) {
      missing(what, parameters, error == 1 ? "a wait was given up" : "wrong data arrived");
      return -1;
    }
    std::vector<uint64_t> times(blocks);
    MUST(cudaMemcpy(times.data(), took, blocks * sizeof times[0], cudaMemcpyDeviceToHost));
    return double(*std::max_element(times.begin(), times.end()));
  }
};

std::string words(std::initializer_list<std::pair<const char*, int>> parameters) {
  std::string text;
  for (const auto& [name, value] : parameters)
    text += (text.empty() ? "" : " ") + std::string(name) + "=" + std::to_string(value);
  return text;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int grid, int cluster, int shared,
                   bool cooperative, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = THREADS;
  config.dynamicSmemBytes = shared;
  config.attrs = cluster ? attributes : attributes + 1;
  config.numAttrs = (cluster ? 1 : 0) + (cooperative ? 1 : 0);
  if (!config.numAttrs) config.attrs = nullptr;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class Kernel>
void allow(Kernel kernel, int shared, bool wide) {
  MUST(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  if (wide) MUST(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

int most_clusters(int cluster, int shared) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = cluster;
  config.blockDim = THREADS;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  MUST(cudaOccupancyMaxActiveClusters(&clusters, push_kernel, &config));
  return clusters;
}

// ---- measurements, the ones a design hangs on first
// ----------------------------------------------

void occupancy() {
  for (int cluster : {2, 4, 8, 16})
    for (int kilobytes : {0, 100, 200})
      row("resident clusters", words({{"cluster", cluster}, {"shared_kib", kilobytes}}),
          most_clusters(cluster, kilobytes * 1024), "clusters");
}

void cluster_exchange(Memory& memory) {
  constexpr int ROUNDS = 2000;
  for (int cluster : {2, 4, 8, 16}) {
    for (bool full : {false, true}) {
      const int clusters = full ? most_clusters(cluster, SHARED_LIMIT) : 1;
      if (clusters == 0) continue;
      const int grid = clusters * cluster;
      {
        const std::string parameters = words({{"cluster", cluster}, {"clusters", clusters}});
        std::vector<double> times;
        for (int i = 0; i < REPEATS && time_is_left(); ++i) {
          memory.clear();
          MUST(launch(cluster_sync_kernel, grid, cluster, 0, false, ROUNDS, memory.took));
          times.push_back(memory.longest("cluster.sync", parameters, grid) / ROUNDS);
        }
        if (!times.empty()) row("cluster.sync", parameters, median(times), "ns");
      }
      for (int slice : {64, 256, 1024, 2048, 4096, 8192}) {
        const std::string parameters =
            words({{"cluster", cluster}, {"clusters", clusters}, {"slice", slice}});
        if (2 * cluster * slice > SHARED_LIMIT) continue;
        std::vector<double> times;
        for (int i = 0; i < REPEATS && time_is_left(); ++i) {
          memory.clear();
          MUST(launch(push_kernel, grid, cluster, SHARED_LIMIT, false, ROUNDS, cluster, slice,
                      memory.took, memory.failed));
          const double longest = memory.longest("push round", parameters, grid);
          if (longest < 0) break;
          times.push_back(longest / ROUNDS);
        }
        if (times.empty()) continue;
        row("push round", parameters, median(times), "ns");
        row("push bandwidth", parameters, double(slice) * cluster / median(times),
            "GB/s per block");
      }
    }
  }
}

template <int TILES, int NARROW>
void product(Memory& memory) {
  constexpr int ROUNDS = 2000, K = 2 * TILES * 16;
  constexpr int SHARED = NARROW * 8 * (K + 8) * 2 + NARROW * 4 * 32 * 16;
  const std::string parameters = words({{"rows", 64}, {"K", K}, {"batch", 8 * NARROW}});
  if (!time_is_left()) return;
  allow(product_kernel<TILES, NARROW>, SHARED, false);
  std::vector<double> times;
  for (int i = 0; i < REPEATS; ++i) {
    memory.clear();
    MUST(launch(product_kernel<TILES, NARROW>, memory.processors, 0, SHARED, false, ROUNDS,
                memory.weights, memory.result, memory.took));
    times.push_back(memory.longest("product", parameters, memory.processors) / ROUNDS);
  }
  row("product with weights in registers", parameters, median(times), "cycles");
}

void products(Memory& memory) {
  product<8, 1>(memory), product<8, 2>(memory), product<8, 4>(memory), product<8, 8>(memory);
  product<16, 1>(memory), product<16, 2>(memory), product<16, 4>(memory), product<16, 8>(memory);
  product<32, 1>(memory), product<32, 2>(memory), product<32, 4>(memory);  // 8 spills
}

void block_sync(Memory& memory) {
  constexpr int ROUNDS = 10000;
  std::vector<double> times;
  for (int i = 0; i < REPEATS && time_is_left(); ++i) {
    memory.clear();
    MUST(launch(block_sync_kernel, 1, 0, 0, false, ROUNDS, memory.took));
    times.push_back(memory.longest("__syncthreads", "", 1) / ROUNDS);
  }
  if (!times.empty()) row("__syncthreads", words({{"threads", THREADS}}), median(times), "ns");
}

void second_level_cache(Memory& memory) {
  constexpr int ROUNDS = 1000;
  for (int blocks : {2, 32, 128}) {
    if (blocks > memory.processors) continue;
    std::vector<double> sync;
    for (int i = 0; i < REPEATS && time_is_left(); ++i) {
      memory.clear();
      MUST(launch(grid_sync_kernel, blocks, 0, 0, true, ROUNDS, memory.took));
      sync.push_back(memory.longest("grid.sync", "", blocks) / ROUNDS);
    }
    if (!sync.empty()) row("grid.sync", words({{"blocks", blocks}}), median(sync), "ns");
    for (int size : {4, 32})
      for (auto [hop, name] :
           {std::pair{COUNTER, "hop by counter"}, std::pair{FLAGS, "hop by flags"},
            std::pair{PACKETS, "hop by packets"}}) {
        const std::string parameters = words({{"blocks", blocks}, {"packets_per_block", size}});
        std::vector<double> times;
        for (int i = 0; i < REPEATS && time_is_left(); ++i) {
          memory.clear();
          MUST(launch(hop_kernel, blocks, 0, 0, true, hop, ROUNDS, size, memory.flags, memory.plain,
                      memory.packets, memory.took, memory.failed));
          const double longest = memory.longest(name, parameters, blocks);
          if (longest < 0) break;
          times.push_back(longest / ROUNDS);
        }
        if (!times.empty()) row(name, parameters, median(times), "ns");
      }
  }
}

// Whether a grid of clusters may also be cooperative, that is, whether all of it is resident.
void cooperative_clusters(Memory& memory) {
  for (int cluster : {2, 4, 8}) {
    const cudaError_t status =
        launch(cluster_sync_kernel, 8 * cluster, cluster, 0, true, 10, memory.took);
    const std::string parameters = words({{"cluster", cluster}});
    if (status == cudaSuccess)
      row("cooperative launch of clusters", parameters, 1, "accepted");
    else
      missing("cooperative launch of clusters", parameters, cudaGetErrorString(status));
    cudaGetLastError();  // a refused launch is an answer, not a failure
    MUST(cudaDeviceSynchronize());
  }
}

void graph_nodes(Memory& memory) {
  constexpr int NODES = 256, REPLAYS = 20;
  cudaStream_t stream;
  MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaEvent_t before, after;
  MUST(cudaEventCreate(&before));
  MUST(cudaEventCreate(&after));
  for (bool programmatic : {false, true})
    for (int grid : {1, memory.processors}) {
      if (!time_is_left()) break;
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = grid;
      config.blockDim = THREADS;
      config.stream = stream;
      config.attrs = programmatic ? &attribute : nullptr;
      config.numAttrs = programmatic;
      auto* kernel = programmatic ? dependent_kernel : empty_kernel;
      const std::string parameters = words({{"blocks", grid}, {"programmatic", programmatic}});
      std::vector<double> replayed, launched;
      cudaGraph_t graph;
      cudaGraphExec_t ready;
      MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      for (int i = 0; i < NODES; ++i) MUST(cudaLaunchKernelEx(&config, kernel));
      MUST(cudaStreamEndCapture(stream, &graph));
      MUST(cudaGraphInstantiate(&ready, graph, 0));
      for (int repeat = 0; repeat < REPEATS; ++repeat) {
        float milliseconds;
        MUST(cudaGraphLaunch(ready, stream));
        MUST(cudaEventRecord(before, stream));
        for (int i = 0; i < REPLAYS; ++i) MUST(cudaGraphLaunch(ready, stream));
        MUST(cudaEventRecord(after, stream));
        MUST(cudaStreamSynchronize(stream));
        MUST(cudaEventElapsedTime(&milliseconds, before, after));
        replayed.push_back(1e3 * milliseconds / (REPLAYS * NODES));
        MUST(cudaEventRecord(before, stream));
        for (int i = 0; i < NODES; ++i) MUST(cudaLaunchKernelEx(&config, kernel));
        MUST(cudaEventRecord(after, stream));
        MUST(cudaStreamSynchronize(stream));
        MUST(cudaEventElapsedTime(&milliseconds, before, after));
        launched.push_back(1e3 * milliseconds / NODES);
      }
      MUST(cudaGraphExecDestroy(ready));
      MUST(cudaGraphDestroy(graph));
      row("node of a graph", parameters, median(replayed), "us");
      row("launch from the host", parameters, median(launched), "us");
    }
}

}  // namespace

int main(int count, char** arguments) {
  begin = std::chrono::steady_clock::now();
  if (count > 1) seconds_given = std::atof(arguments[1]);
  std::printf("what,parameters,value,unit,missing\n");
  Memory memory;
  allow(push_kernel, SHARED_LIMIT, true);
  allow(cluster_sync_kernel, SHARED_LIMIT, true);
  occupancy();
  cluster_exchange(memory);
  products(memory);
  block_sync(memory);
  second_level_cache(memory);
  graph_nodes(memory);
  cooperative_clusters(memory);
  std::fprintf(stderr, "constants: %s\n", time_is_left() ? "all measured" : "the time was over");
  return 0;
}
