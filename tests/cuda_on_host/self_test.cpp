// One small kernel for each thing that the host claims to do or to find: `self_test NAME [SEED]`
// prints what came out, or the fault. tests/test_cuda_on_host.py says what that should be.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.h"

using namespace torch_bptt;
using namespace torch_bptt::cuda;

namespace {

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (Error error = launch(kernel, how, arguments...)) std::printf("refused: %s\n", error);
}

void print(const char* name, const std::vector<float>& values) {
  std::printf("%s", name);
  for (float value : values) std::printf(" %.9g", value);
  std::printf("\n");
}

// ---- meeting ------------------------------------------------------------------------------------

// Everyone writes, then reads a neighbour's: right only with a barrier in between.
__global__ void read_neighbour(float* out, bool barrier) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned i = thread_index(), n = block_threads();
  shared[i] = float(i);
  if (barrier) sync_block();
  out[block_index().x * n + i] = shared[(i + 1) % n];
}

void neighbours(bool barrier) {
  std::vector<float> out(128);
  start(read_neighbour, {.grid = {2}, .threads = 64, .shared_bytes = 64 * 4}, out.data(), barrier);
  print("out", out);
}

__global__ void halves_meet(float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned i = thread_index(), half = i / 64;
  for (int step = 0; step < 3; ++step) {
    shared[i] = float(100 * step + i);
    sync_part(1 + int(half), 64);
    out[i] = shared[half * 64 + (i + 1) % 64];
    sync_part(1 + int(half), 64);
  }
}

__global__ void one_does_not_come() {
  if (thread_index() == 40) return;
  sync_block();
}

__global__ void lanes_part(float* out) {
  if (lane_index() < 16)
    out[0] = warp_shuffle_xor(1.f, 1);
  else
    warp_sync();
}

__global__ void wait_for_each_other() {
  if (warp_index() == 0)
    sync_part(1, 64);
  else
    sync_part(2, 64);
}

// ---- a warp -------------------------------------------------------------------------------------

__global__ void sum_of_lanes(float* out) {
  float sum = float(1 + thread_index());
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += warp_shuffle_xor(sum, lanes);
  out[thread_index()] = sum;
  const double from_five = warp_shuffle_xor(double(thread_index()), 5);
  if (lane_index() == 0) out[64 + warp_index()] = float(from_five);
}

// d = a b^T of a (16, 16) and b (8, 16), both row-major in shared memory, as a recurrent product
// is.
template <class S>
__global__ void product16(const S* a, const S* b, float* d) {
  auto* shared = reinterpret_cast<S*>(shared_memory());
  S *a_shared = shared, *b_shared = shared + 256;
  for (unsigned i = lane_index(); i < 256; i += kWarp) a_shared[i] = a[i];
  for (unsigned i = lane_index(); i < 128; i += kWarp) b_shared[i] = b[i];
  warp_sync();
  const unsigned lane = lane_index(), matrix = lane / 8, row = lane % 8;
  const unsigned down = 8 * (matrix & 1), right = 8 * (matrix >> 1);
  uint32_t a_registers[4], b_registers[4];  // of b the same two matrices twice
  warp_load_matrices(a_registers, a_shared + (down + row) * 16 + right);
  warp_load_matrices(b_registers, b_shared + row * 16 + down);
  float sums[4] = {};
  warp_mma<S>(sums, a_registers, {b_registers[0], b_registers[1]});
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i >> 1)) * 8 + 2 * (lane % 4) + (i & 1)] = sums[i];
}

__global__ void product_tf32(const float* a, const float* b, float* d) {
  const unsigned g = lane_index() / 4, t = lane_index() % 4;
  uint32_t a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) a_registers[i] = to_tf32(a[(g + 8 * (i & 1)) * 8 + t + 4 * (i >> 1)]);
  for (int i = 0; i < 2; ++i) b_registers[i] = to_tf32(b[g * 8 + t + 4 * i]);
  float sums[4] = {};
  warp_mma_tf32(sums, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = sums[i];
}

// Integers up to 12, so that every sum is exact; the largest difference from three loops.
template <class S, int K>
void check_product(const char* name, void (*kernel)(const S*, const S*, float*)) {
  std::vector<S> a(16 * K), b(8 * K);
  std::vector<float> a_wide(16 * K), b_wide(8 * K), d(128);
  for (int i = 0; i < 16 * K; ++i) a[i] = narrow<S>(a_wide[i] = float(i * 7 % 25 - 12));
  for (int i = 0; i < 8 * K; ++i) b[i] = narrow<S>(b_wide[i] = float(i * 11 % 23 - 11));
  start(kernel, {.threads = 32, .shared_bytes = 1024}, a.data(), b.data(), d.data());
  float worst = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += a_wide[m * K + k] * b_wide[n * K + k];
      worst = std::fmax(worst, std::fabs(sum - d[m * 8 + n]));
    }
  print(name, {worst});
}

// ---- numbers ------------------------------------------------------------------------------------

// Every finite number of S comes back; what lies between two neighbours goes to the nearer one, the
// middle to the even one.
template <class S>
void check_rounding(const char* name, uint16_t infinity) {
  int wrong = 0;
  for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000)
    for (uint16_t bits = 0; bits < infinity; ++bits) {
      const uint16_t here = uint16_t(bits | sign), next = uint16_t(here + 1);
      const float low = widen(S{here});
      // Beyond the largest number as if it had a successor: half of the way there is infinity.
      const float below = widen(S{uint16_t(here - 1)});
      const float high = bits + 1 < infinity ? widen(S{next}) : 2 * low - below;
      const float middle = float((double(low) + high) / 2);
      const uint16_t even = here % 2 ? next : here;
      wrong += narrow<S>(low).bits != here;
      if (!std::isfinite(high)) continue;
      wrong += narrow<S>(middle).bits != even;
      wrong += narrow<S>(std::nextafter(middle, low)).bits != here;
      wrong += narrow<S>(std::nextafter(middle, high)).bits != next;
    }
  wrong += !std::isnan(widen(narrow<S>(NAN))) + !std::isinf(widen(narrow<S>(INFINITY)));
  print(name, {float(wrong)});
}

// ---- shared memory ------------------------------------------------------------------------------

__global__ void read_before_writing(float* out) {
  out[thread_index()] = reinterpret_cast<float*>(shared_memory())[thread_index()];
}

__global__ void copy_rows(const float* in, float* out, bool wait) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned i = thread_index();
  copy_async<16>(shared + 4 * i, in + 4 * i, 8);
  commit_copies();
  copy_async<4>(shared + 128 + i, in + i);
  commit_copies();
  if (wait) wait_copies<1>();
  for (int j = 0; j < 4; ++j) out[4 * i + j] = shared[4 * i + j];
  if (wait) wait_copies<0>();
  out[128 + i] = shared[128 + i];
}

__global__ void misaligned(float* out) {
  out[0] = float(load_words<16>(shared_memory() + 4).word[0]);
}

__global__ void beyond(const float* in) { copy_async<16>(shared_memory() + 1024, in); }

// ---- clusters -----------------------------------------------------------------------------------

// What can be left out of the exchange below.
enum Flaw { none, no_wait, expects_too_much, one_place, leaves_early };

// Every thread sends its number to all blocks of the cluster, its own too, into one of two places;
// its next number is a sum over what came. Two places suffice: who passes the wait of a step has
// letters of that step from all threads, so all have read what came the step before.
__global__ void __launch_bounds__(64) exchange(float* out, int steps, Flaw flaw) {
  struct Shared {
    Mailbox boxes[2];
    Words4 letters[2][4][64];
  };
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const unsigned i = thread_index(), rank = cluster_rank();
  if (i == 0) {
    init_mailbox(&shared.boxes[0], 1);
    init_mailbox(&shared.boxes[1], 1);
    publish_mailboxes();
  }
  sync_cluster();
  uint32_t number = 100 * rank + i;
  for (int step = 0; step < steps; ++step) {
    const int place = flaw == one_place ? 0 : step & 1;
    const unsigned parity = flaw == one_place ? step & 1 : step >> 1 & 1;
    Mailbox* box = &shared.boxes[place];
    if (i == 0) arrive_expecting(box, 4 * 64 * 16 + (flaw == expects_too_much ? 16 : 0));
    for (unsigned to = 0; to < 4; ++to)
      send(in_block(to, &shared.letters[place][rank][i]), Words4{number}, in_block(to, box));
    if (flaw == leaves_early && step + 1 == steps) return;
    if (flaw != no_wait) wait_for_mail(box, parity);
    number = 0;
    for (unsigned from = 0; from < 4; ++from)
      number += shared.letters[place][from][(i + from) % 64].word[0] * (from + 1) % 1009;
  }
  sync_cluster();
  out[block_index().x * 64 + i] = float(number);
}

template <Flaw FLAW>
void run_exchange() {
  std::vector<float> out(8 * 64);
  start(exchange, {.grid = {8}, .threads = 64, .cluster = 4, .shared_bytes = 8208}, out.data(), 25,
        FLAW);
  print("out", out);
}

__global__ void uninitialised_mailbox() {
  wait_for_mail(reinterpret_cast<Mailbox*>(shared_memory()), 0);
}

// Two phases end before the reader, which waits for the first, looks again.
__global__ void missed_phase() {
  auto* box = reinterpret_cast<Mailbox*>(shared_memory());
  if (thread_index() == 0) init_mailbox(box, 1);
  sync_block();
  if (thread_index() == 32) wait_for_mail(box, 0);
  if (thread_index() == 63) {
    arrive_expecting(box, 0);
    arrive_expecting(box, 0);
  }
}

// ---- a whole grid -------------------------------------------------------------------------------

enum GridFlaw { sound, forgets_to_wait, publishes_early, reuses_early, waits_for_nobody };

// In each step the blocks of a cluster send each other their numbers; the sums over what came go,
// through global memory, to the blocks of the same rank in all clusters. There are two places there
// too: who has waited for the numbers of a step knows that all have read those of the step before.
__global__ void __launch_bounds__(256)
    circulate(float* out, uint32_t* numbers, uint32_t* flags, int steps, GridFlaw flaw) {
  struct Shared {
    Mailbox boxes[2];
    Words4 letters[2][4][256];
  };
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const unsigned i = thread_index(), n = block_threads(), block = block_index().x,
                 rank = cluster_rank(), ranks = host::place().cluster_blocks,
                 cluster = block / ranks, clusters = grid_blocks().x / ranks;
  if (i == 0) {
    init_mailbox(&shared.boxes[0], 1);
    init_mailbox(&shared.boxes[1], 1);
    publish_mailboxes();
  }
  sync_cluster();
  uint32_t number = 100 * block + i;
  for (int step = 0; step < steps; ++step) {
    const int place = step & 1;
    Mailbox* box = &shared.boxes[place];
    if (i == 0) arrive_expecting(box, int(ranks * n * 16));
    for (unsigned to = 0; to < ranks; ++to)
      send(in_block(to, &shared.letters[place][rank][i]), Words4{number}, in_block(to, box));
    wait_for_mail(box, step >> 1 & 1);
    number = rank;
    for (unsigned from = 0; from < ranks; ++from)
      number += shared.letters[place][from][(i + from) % n].word[0] * (from + 1) % 1009;

    uint32_t* all = numbers + (flaw == reuses_early ? 0 : place) * grid_blocks().x * n;
    const uint32_t done = uint32_t(step) + 1;
    if (flaw == publishes_early && i == 0) publish(flags + block, done);
    all[block * n + i] = number;
    sync_block();
    if (flaw != publishes_early && i == 0) publish(flags + block, done);
    const bool too_much = flaw == waits_for_nobody && done == uint32_t(steps);
    if (i < clusters && flaw != forgets_to_wait)
      wait_for_flag(flags + i * ranks + rank, done + too_much);
    sync_block();
    number = 10 * cluster;
    for (unsigned from = 0; from < clusters; ++from)
      number += all[(from * ranks + rank) * n + (i + from) % n] * (from + 1) % 1009;
  }
  sync_cluster();
  out[block * n + i] = float(number);
}

template <GridFlaw FLAW>
void run_circulate(Launch how, int steps) {
  const size_t blocks = how.grid.x, threads = blocks * how.threads;
  std::vector<float> out(threads);
  std::vector<uint32_t> numbers(2 * threads), flags(blocks, ~0u);
  how.shared_bytes = 32784;
  clear(flags.data(), blocks * 4, how.stream);
  start(circulate, how, out.data(), numbers.data(), flags.data(), steps, FLAW);
  print("out", out);
}

constexpr Launch kThreeClusters{.grid = {6}, .threads = 64, .cluster = 2, .whole_grid = true};

// One thread publishes, the cluster meets, then each of its threads publishes. Every thread of the
// second cluster waits for one of those, and counts how often it does not see the first number.
__global__ void publish_in_turn(float* missed, uint32_t* flags, int steps) {
  const unsigned i = cluster_rank() * block_threads() + thread_index();
  const volatile uint32_t* first = flags;
  for (uint32_t step = 1; step <= uint32_t(steps); ++step) {
    if (block_index().x >= host::place().cluster_blocks) {
      wait_for_flag(flags + 1 + i, step);
      missed[i] += *first < step;
      continue;
    }
    if (i == 0) publish(flags, step);
    sync_cluster();
    publish(flags + 1 + i, step);
  }
}

// Two blocks take turns; the second one counts what it reads before the first one has written it.
__global__ void write_too_late(float* stale, uint32_t* flags, volatile uint32_t* data, int steps) {
  if (thread_index() > 0) return;
  for (uint32_t step = 1; step <= uint32_t(steps); ++step) {
    if (block_index().x == 0) {
      publish(flags + 0, step);
      *data = step;
      wait_for_flag(flags + 1, step);
    } else {
      wait_for_flag(flags + 0, step);
      *stale += *data < step;
      publish(flags + 1, step);
    }
  }
}

__global__ void flag_in_shared_memory() {
  publish(reinterpret_cast<uint32_t*>(shared_memory()) + 4, 1);
}
__global__ void misaligned_flag(float* out) {
  wait_for_flag(reinterpret_cast<uint32_t*>(reinterpret_cast<unsigned char*>(out) + 2), 1);
}

// ---- launches -----------------------------------------------------------------------------------

__global__ void mark(float* out, Index3 grid) {
  const Index3 block = block_index(), blocks = grid_blocks();
  const bool same = blocks.x == grid.x && blocks.y == grid.y && blocks.z == grid.z;
  if (thread_index() == 0 && same) out[(block.z * grid.y + block.y) * grid.x + block.x] += 1;
}

void print_active_clusters(const Launch& how) {
  int clusters = 0;
  const Error error = active_clusters(mark, how, &clusters);
  print(error ? error : "clusters", {float(clusters)});
}

void switches() {  // how long a fiber's turn takes
  std::vector<float> out(256);
  const uint64_t begin = nanoseconds();
  void (*kernel)(float*) = [](float* out) {
    for (int step = 0; step < 1000; ++step) sync_block();
    out[thread_index()] = 1;
  };
  start(kernel, {.threads = 256}, out.data());
  print("nanoseconds", {float(nanoseconds() - begin) / 256e3f});
}

const std::map<std::string, void (*)()> kTests = {
    {"barrier", [] { neighbours(true); }},
    {"race", [] { neighbours(false); }},
    {"parts",
     [] {
       std::vector<float> out(128);
       start(halves_meet, {.threads = 128, .shared_bytes = 512}, out.data());
       print("out", out);
     }},
    {"one_does_not_come", [] { start(one_does_not_come, {.grid = {3}, .threads = 64}); }},
    {"lanes_part",
     [] {
       std::vector<float> out(1);
       start(lanes_part, {.threads = 32}, out.data());
     }},
    {"wait_for_each_other", [] { start(wait_for_each_other, {.threads = 64}); }},
    {"warp",
     [] {
       std::vector<float> out(66);
       start(sum_of_lanes, {.threads = 64}, out.data());
       print("out", out);
     }},
    {"products",
     [] {
       check_product<bfloat16, 16>("bfloat16", product16<bfloat16>);
       check_product<float16, 16>("float16", product16<float16>);
       check_product<float, 8>("tf32", product_tf32);
     }},
    {"rounding",
     [] {
       check_rounding<bfloat16>("bfloat16", 0x7f80);
       check_rounding<float16>("float16", 0x7c00);
       print("tf32", {as_float(to_tf32(1 + 0x1p-11f)), as_float(to_tf32(1 + 0x0.fffp-11f)),
                      as_float(to_tf32(-1 - 0x1p-11f))});
     }},
    {"uninitialised",
     [] {
       std::vector<float> out(32);
       start(read_before_writing, {.threads = 32, .shared_bytes = 128}, out.data());
       print("out", out);
     }},
    {"copies",
     [] {
       alignas(16) float in[128];
       for (int i = 0; i < 128; ++i) in[i] = float(i + 1);
       for (bool wait : {true, false}) {
         std::vector<float> out(160);
         start(copy_rows, {.threads = 32, .shared_bytes = 640}, in, out.data(), wait);
         print(wait ? "waited" : "not_waited", out);
       }
     }},
    {"misaligned",
     [] {
       std::vector<float> out(32);
       start(misaligned, {.threads = 32, .shared_bytes = 128}, out.data());
     }},
    {"beyond",
     [] {
       alignas(16) float in[4] = {};
       start(beyond, {.threads = 32, .shared_bytes = 1024}, in);
     }},
    {"exchange", run_exchange<none>},
    {"exchange_no_wait", run_exchange<no_wait>},
    {"exchange_expects_too_much", run_exchange<expects_too_much>},
    {"exchange_one_place", run_exchange<one_place>},
    {"exchange_leaves_early", run_exchange<leaves_early>},
    {"uninitialised_mailbox",
     [] { start(uninitialised_mailbox, {.threads = 32, .shared_bytes = 128}); }},
    {"missed_phase", [] { start(missed_phase, {.threads = 64, .shared_bytes = 128}); }},
    {"circulate", [] { run_circulate<sound>(kThreeClusters, 25); }},
    {"circulate_forgets_to_wait", [] { run_circulate<forgets_to_wait>(kThreeClusters, 25); }},
    {"circulate_publishes_early", [] { run_circulate<publishes_early>(kThreeClusters, 25); }},
    {"circulate_reuses_early", [] { run_circulate<reuses_early>(kThreeClusters, 25); }},
    {"circulate_waits_for_nobody", [] { run_circulate<waits_for_nobody>(kThreeClusters, 25); }},
    {"circulate_apart",
     [] {
       Launch how = kThreeClusters;
       how.whole_grid = false;
       run_circulate<sound>(how, 25);
     }},
    {"circulate_large",
     [] {
       run_circulate<sound>({.grid = {32}, .threads = 256, .cluster = 4, .whole_grid = true}, 3);
     }},
    {"publish_in_turn",
     [] {
       std::vector<float> missed(128);
       std::vector<uint32_t> flags(129);
       start(publish_in_turn, {.grid = {4}, .threads = 64, .cluster = 2, .whole_grid = true},
             missed.data(), flags.data(), 20);
       print("missed", missed);
       print("flags", {flags.begin(), flags.end()});
     }},
    {"write_too_late",
     [] {
       float stale = 0;
       uint32_t flags[2] = {}, data = 0;
       start(write_too_late, {.grid = {2}, .threads = 32, .whole_grid = true}, &stale, flags, &data,
             1000);
       print("stale", {stale});
     }},
    {"flag_in_shared_memory",
     [] { start(flag_in_shared_memory, {.threads = 32, .shared_bytes = 128}); }},
    {"misaligned_flag",
     [] {
       std::vector<float> out(2);
       start(misaligned_flag, {.threads = 32}, out.data());
     }},
    {"whole_grids",
     [] {
       std::vector<float> out(94);
       const auto try_one = [&](Launch how) {
         how.whole_grid = true;
         start(mark, how, out.data(), how.grid);
       };
       try_one({.grid = {93}, .threads = 256});  // just below what the host can run
       print("out", out);
       try_one({.grid = {94}, .threads = 256});
       try_one({.grid = {133}, .shared_bytes = 200 * 1024});
       try_one({.grid = {63 * 2}, .cluster = 2, .shared_bytes = 200 * 1024});
       print_active_clusters({.shared_bytes = 200 * 1024, .whole_grid = true});
       print_active_clusters({.grid = {2}, .cluster = 2, .shared_bytes = 100 * 1024});
       print_active_clusters({.grid = {16}, .threads = 1024, .cluster = 16});
     }},
    {"launches",
     [] {
       const Index3 grid{4, 3, 2};
       std::vector<float> out(24);
       start(mark, {.grid = grid, .threads = 32, .cluster = 2}, out.data(), grid);
       print("out", out);
       start(mark, {.grid = {0}}, out.data(), grid);
       start(mark, {.grid = {3}, .cluster = 2}, out.data(), grid);
       start(mark, {.threads = 2048}, out.data(), grid);
       start(mark, {.shared_bytes = 240 * 1024}, out.data(), grid);
     }},
    {"switches", switches},
};

}  // namespace

int main(int count, char** arguments) {
  const auto test = kTests.find(count > 1 ? arguments[1] : "");
  if (test == kTests.end()) return 2;
  if (count > 2) host::set_schedule_seed(std::strtoull(arguments[2], nullptr, 10));
  try {
    test->second();
  } catch (const host::Fault& fault) {
    std::printf("fault: %s\n", fault.what());
  }
}
