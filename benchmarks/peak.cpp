// The peak of this machine's arithmetic: chains of multiply-adds that stay in registers and do not
// wait for each other. Plain C interface, for peak.py.

#include <chrono>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int kChains = 12;  // two units, a latency of four to six cycles; with AVX2, 16 registers
constexpr int kSteps = 1000;

template <class T>
struct MultiplyAdd {
  typedef T Vector __attribute__((vector_size(kBytes)));
  static constexpr double kFlops = 2.0 * kBytes / sizeof(T);
  Vector factor = Vector{} + T(0.5), term = Vector{} + T(1);
  Vector operator()(Vector sum) const { return sum * factor + term; }
};

#ifdef __AVX512BF16__
// Products of pairs of bfloat16, added up in float32.
struct DotBfloat16 {
  typedef __m512 Vector;
  static constexpr double kFlops = 2.0 * 32;
  __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  Vector operator()(Vector sum) const { return _mm512_dpbf16_ps(sum, factor, factor); }
};
#else
using DotBfloat16 = MultiplyAdd<float>;
#endif

template <class Operation>
void chains() {
  const Operation operation;
  typename Operation::Vector sums[kChains] = {};
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = operation(sums[chain]);
      asm volatile("" : "+x"(sums[chain]));  // to be computed, although nobody uses it
    }
  }
}

// All threads at once, for as long as told.
template <class Operation>
double gflops(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  double rounds = 0;
  const auto start = Clock::now();
  auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
#pragma omp parallel num_threads(threads) reduction(+ : rounds)
  while (elapsed() < seconds) {
    chains<Operation>();
    ++rounds;
  }
  return 1e-9 * rounds * kSteps * kChains * Operation::kFlops / elapsed();
}

}  // namespace

extern "C" {
double peak_float32(int threads, double seconds) {
  return gflops<MultiplyAdd<float>>(threads, seconds);
}
double peak_float64(int threads, double seconds) {
  return gflops<MultiplyAdd<double>>(threads, seconds);
}
double peak_bfloat16(int threads, double seconds) { return gflops<DotBfloat16>(threads, seconds); }
}
