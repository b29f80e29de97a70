// The threads that share the work of one call, and how it is cut.
//
// A sequence is cut across its rows, where every thread runs the whole loop over time alone, or
// across its columns, where all threads need the state of all before the next step. No sum is ever
// cut, so results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <thread>

#include "matmul.h"

TORCH_BPTT_KERNELS_BEGIN

// Where the threads of a team wait for one another. Spinning: between two running threads it takes
// about 0.1 us, while waking one takes about 5. A thread that waits long gives its processor away,
// to the one it waits for if there are too few.
class Barrier {
 public:
  Barrier() = default;
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  // Returns when `count` threads have called it.
  void wait(int count) {
    const unsigned now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; ++spins) {
      if (spins < kSpins)
        pause();
      else
        std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 2'000;  // 20 us on Zen 5, 70 us where a pause takes longer

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<unsigned> round{0};
};

struct Range {
  int64_t begin, end;
};

// One thread of a team.
class Team {
 public:
  Team(int index, int count, Barrier& barrier) : index(index), count(count), barrier(barrier) {}

  // This thread's share of `units` equal pieces of work.
  Range share(int64_t units) const { return {units * index / count, units * (index + 1) / count}; }
  void wait() const {
    if (count > 1) barrier.wait(count);
  }

  const int index, count;

 private:
  Barrier& barrier;
};

// body(Team) on `threads` threads at the same time, or on as many as are to be had.
template <class Body>
void run_team(const Parallel& parallel, int threads, const Body& body) {
  Barrier barrier;
  if (threads == 1) return body(Team(0, 1, barrier));
  struct Shared {
    const Body& body;
    Barrier& barrier;
  } shared{body, barrier};
  parallel.run(
      threads,
      [](void* context, int index, int count) {
        const Shared& shared = *static_cast<const Shared*>(context);
        shared.body(Team(index, count, shared.barrier));
      },
      &shared);
}

// Each thread packs its share of the panels of b = source, or of its transpose; nothing where b is
// read in place.
template <class P, class S>
void pack(const Panels<P>& b, const S* source, const Team& team) {
  if (b.in_place) return;
  const Range mine = team.share(b.count());
  b.pack(mine.begin, mine.end, [&](int64_t k) { return source + k * b.N; });
}
template <class P, class S>
void pack_transposed(const Panels<P>& b, const S* source, const Team& team) {
  const Range mine = team.share(b.count());
  b.pack_transposed(source, mine.begin, mine.end);
}

// ---- how the steps of a recurrence are cut ----

struct Cut {
  int threads = 1;
  bool columns = false;
};

// The batch rows and columns of the state that are one thread's.
struct Share {
  Range rows, columns;
};

// Chooses from what a step costs, in cycles: multiply-adds at the rate of the tiles (two vectors a
// cycle), and no less than reading W_hh from the second-level cache (40 bytes a cycle measured,
// Zen 5). Rows are cut in whole tiles, columns in whole panels; cut columns cost a barrier for
// every step (500 cycles with the wait for the slower thread).
template <class C>
Cut cut_steps(const Parallel& parallel, const Schedule& s, int64_t H, int64_t work) {
  constexpr int64_t kMultiplyAdds = 2 * kLanes<C>, kBytes = 40, kBarrier = 500;
  const int64_t most = smaller(parallel.threads, work / kWorkPerThread);
  const int64_t by_rows = larger(1, smaller(most, s.B / kTileRows));
  const int64_t by_columns = larger(1, smaller(most, H / (kColumnUnit<C>)));
  const int64_t read = H * H * int64_t(sizeof(C)) / kBytes;
  const int64_t rows_cost = larger(s.B * H * H / kMultiplyAdds / by_rows, read);
  const int64_t columns_cost = larger(s.B * H * H / kMultiplyAdds, read) / by_columns + kBarrier;
  if (by_columns > 1 && columns_cost < rows_cost) return {int(by_columns), true};
  return {int(by_rows), false};
}

// Rows are cut so that every thread has about the same number of them over all steps.
template <class C>
Share share_of(const Cut& cut, const Schedule& s, int64_t H, const Team& team) {
  if (cut.columns) {
    const Range units = team.share((H + kColumnUnit<C> - 1) / kColumnUnit<C>);
    return {{0, s.B}, {units.begin * kColumnUnit<C>, smaller(units.end * kColumnUnit<C>, H)}};
  }
  const auto row = [&](int k) {
    if (!s.lengths || k == 0 || k == team.count) return s.B * k / team.count;
    int64_t b = 0;
    for (int64_t sum = 0; sum < s.rows() * k / team.count; ++b) sum += s.lengths[b];
    return b;
  };
  return {{row(team.index), row(team.index + 1)}, {0, H}};
}

TORCH_BPTT_KERNELS_END
