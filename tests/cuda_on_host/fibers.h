// Runs a CUDA kernel on the CPU, so that its logic can be tested without a GPU: every CUDA thread
// is a fiber, and one thread of the operating system runs them all, one at a time. The blocks of a
// cluster run together, clusters one after another; all of them together where the launch is of a
// whole grid.
//
// A fiber runs until it has to wait. Which one runs next is the order of arrival, or random where
// TORCH_BPTT_SCHEDULE_SEED is set and not 0: then threads race as they may on a GPU, some fall far
// behind, and what is sent to another block or published comes late and in any order that may be.
// Shared memory starts as NaN. What a GPU leaves undefined ends in a Fault that says where: a
// deadlock and who waits for what, lanes of a warp that part at a common operation, mail for a
// block that has ended, misaligned or foreign addresses.
//
// It does not model the order in which other threads see plain writes to memory, nor the bits a GPU
// drops in the sums of its matrix products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>

namespace torch_bptt::cuda::host {

using Where = std::source_location;

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Block;
struct Warp;
struct Thread;

struct Place {
  unsigned thread, block_threads, cluster_rank, cluster_blocks;
  unsigned block[3], grid[3];
};

struct Start {
  unsigned grid[3], threads, cluster;
  size_t shared_bytes;
  bool whole_grid;
};

// That can run at a time. The stack of each and the page that guards it are two mappings, of which
// Linux allows a process 65530.
constexpr size_t kMostThreads = 24000;

// The seed of all launches from now on, instead of the environment's. 0: fixed order.
void set_schedule_seed(uint64_t seed);

// Runs body(context) once for every thread of the grid.
void run(const Start& start, void (*body)(void*), void* context);

// ---- for the running fiber ----------------------------------------------------------------------

const Place& place();
unsigned char* shared_memory();
[[noreturn]] void fault(const char* message, const Where& where);
// Faults unless `bytes` bytes at `address` lie in the block's shared memory, aligned to that.
void check_shared(const void* address, size_t bytes, const Where& where);
void check_aligned(const void* address, size_t bytes, const Where& where);

void sync_block(const Where& where);
void sync_part(int id, int threads, const Where& where);
void sync_cluster(const Where& where);

// All lanes of the warp hand in something; the last one to come does combine() for all of them.
void warp_together(const char* what, void* mine, void (*combine)(void* const* lanes),
                   const Where& where);

void copy_async(void* shared, const void* global, int bytes, int valid, const Where& where);
void commit_copies();
void wait_copies(int pending);

// An mbarrier. As large as on the GPU, so that layouts of shared memory stay the same.
struct Mailbox {
  int32_t bytes;  // that the phase still waits for; negative: they came before they were expected
  uint16_t pending;        // arrivals that the phase still waits for
  uint16_t arrivals : 15;  // for each phase; all ones: not initialised
  uint16_t parity : 1;     // of the current phase
};
static_assert(sizeof(Mailbox) == 8);

struct Remote {
  Block* block;
  unsigned char* address;
  Remote operator+(int bytes) const { return {block, address + bytes}; }
};
Remote in_block(unsigned rank, const void* own, const Where& where);

void init_mailbox(Mailbox* box, int arrivals, const Where& where);
void arrive_expecting(Mailbox* box, int bytes, const Where& where);
void wait_for_mail(Mailbox* box, unsigned parity, const Where& where);
void send(Remote to, const void* value, int bytes, Remote box, const Where& where);

// Only publish() wakes who waits for a flag.
void publish(uint32_t* flag, uint32_t value, const Where& where);
void wait_for_flag(const uint32_t* flag, uint32_t value, const Where& where);

}  // namespace torch_bptt::cuda::host
