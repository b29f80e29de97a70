#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define TORCH_BPTT_ASAN(...) __VA_ARGS__
#else
#define TORCH_BPTT_ASAN(...)
#endif

#if !defined(__x86_64__) || defined(TORCH_BPTT_PORTABLE_FIBERS)
#include <ucontext.h>
#endif

namespace torch_bptt::cuda::host {
namespace {

// ---- switching stacks ---------------------------------------------------------------------------

[[noreturn]] void run_thread();

#if defined(__x86_64__) && !defined(TORCH_BPTT_PORTABLE_FIBERS)

// Pushes what the caller of a function may expect to keep, leaves the stack pointer in *from, and
// takes up where the stack `to` was left.
extern "C" void torch_bptt_switch_stack(void** from, void* to);
asm(R"(
  .text
  .globl torch_bptt_switch_stack
  .hidden torch_bptt_switch_stack
  .type torch_bptt_switch_stack, @function
torch_bptt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size torch_bptt_switch_stack, .-torch_bptt_switch_stack
)");

struct Context {
  void* stack_pointer = nullptr;

  void start(unsigned char* stack, size_t bytes) {
    auto** top = reinterpret_cast<void**>(stack + bytes);
    top[-2] = reinterpret_cast<void*>(run_thread);  // where `ret` goes
    stack_pointer = top - 8;                        // with six registers to pop before
  }
  static void change(Context& from, Context& to) {
    torch_bptt_switch_stack(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context{};

  void start(unsigned char* stack, size_t bytes) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    makecontext(&context, static_cast<void (*)()>(run_thread), 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

// A stack for a fiber, with a page below it that may not be touched.
class Stack {
 public:
  static constexpr size_t kPage = 4096;
  static constexpr size_t kBytes = TORCH_BPTT_ASAN(4 *) 64 * 1024;

  Stack() {
    void* memory = mmap(nullptr, kPage + kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    begin = static_cast<unsigned char*>(memory);
    if (mprotect(begin, kPage, PROT_NONE) == 0) return;
    munmap(begin, kPage + kBytes);
    throw std::bad_alloc();
  }
  ~Stack() {
    TORCH_BPTT_ASAN(__asan_unpoison_memory_region(data(), kBytes);)
    munmap(begin, kPage + kBytes);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  unsigned char* data() const { return begin + kPage; }

 private:
  unsigned char* begin;
};

}  // namespace

// ---- what there is ------------------------------------------------------------------------------

namespace {

using Index = std::array<unsigned, 3>;  // of a block in the grid

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid, group;

  void run() const {
    std::memcpy(shared, global, valid);
    std::memset(static_cast<unsigned char*>(shared) + valid, 0, bytes - valid);
  }
};

// Where threads come together: they go on when `expected` of them are there.
struct Meeting {
  std::vector<Thread*> waiting;
  int expected = 0;
};

}  // namespace

struct Thread {
  Stack stack;
  Context context;
  TORCH_BPTT_ASAN(void* fake_stack = nullptr;)
  Place place;
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool ended = false;
  const char* waits_for = nullptr;
  Where where;
  std::vector<Copy> copies;
  int copy_group = 0;
};

struct Warp {
  Meeting meeting;
  const char* what = nullptr;
  void (*combine)(void* const*) = nullptr;
  void* lanes[32] = {};
};

struct Block {
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned running = 0;        // threads that have not ended
  Meeting* cluster = nullptr;  // the same for all its blocks
  std::vector<Warp> warps;
  Meeting meetings[16];
};

namespace {

// On its way to a block.
struct Letter {
  Remote to, box;
  int bytes;
  unsigned char value[16];
  Where where;
};

// On its way to a flag.
struct Number {
  uint32_t* flag;
  uint32_t value;
  const Meeting* cluster;  // that published it
};

// One per thread of the operating system that launches kernels.
struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Block> blocks;  // that run at a time, cluster by cluster
  std::vector<Meeting> clusters;
  std::vector<Thread*> ready;
  size_t first_ready = 0;       // in fixed order, those before have gone
  std::vector<Thread*> asleep;  // ready as well; in random order only
  const Block* sleeping_block = nullptr;
  const Warp* sleeping_warp = nullptr;  // null: the whole block
  bool sleeps_deeply = false;           // lets all mail arrive first
  uint64_t until_next_sleeper = 0;
  int nap_bits = 0;
  std::deque<Letter> letters;
  std::vector<Number> numbers;                                    // in the order of publishing
  std::unordered_map<const void*, std::vector<Thread*>> readers;  // of a mailbox or a flag
  Context outside;
  TORCH_BPTT_ASAN(void* fake_stack = nullptr; const void* bottom = nullptr; size_t bytes = 0;)
  void (*body)(void*) = nullptr;
  void* body_context = nullptr;
  std::string failure;

  uint64_t seed_in_use = 0, random_state = 0;
  bool random = false;

  uint64_t draw(uint64_t below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
  }
};

thread_local Machine machine;
// Beside the machine because it is read at every step of a fiber: no initialisation to check.
__thread Thread* current = nullptr;

uint64_t chosen_seed = 0;
bool seed_chosen = false;

uint64_t schedule_seed() {
  if (seed_chosen) return chosen_seed;
  const char* text = std::getenv("TORCH_BPTT_SCHEDULE_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

std::string text_of(const Where& where) {
  std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

std::string text_of(const Place& place) {
  std::string text = "block (";
  for (int i = 0; i < 3; ++i) text += (i ? ", " : "") + std::to_string(place.block[i]);
  return text + ")";
}

// ---- switching ----------------------------------------------------------------------------------

void ready_now(Thread* thread) {
  thread->waits_for = nullptr;
  machine.ready.push_back(thread);
}

void deliver_letter(size_t i);
void deliver_number(size_t i);

// Lets one of letters.size() + numbers.size() arrive. Letters come in any order, the numbers of a
// cluster in theirs: who sees one must see what the thread that published it may have seen.
void deliver(size_t i) {
  const Machine& m = machine;
  if (i < m.letters.size()) return deliver_letter(i);
  const Meeting* cluster = m.numbers[i - m.letters.size()].cluster;
  const auto first = std::ranges::find(m.numbers, cluster, &Number::cluster);
  deliver_number(size_t(first - m.numbers.begin()));
}

// In random order a block or a warp oversleeps now and then, and its mail with it: for a random
// time it goes on only where no other can. Otherwise all would advance at nearly the same pace.
bool sleeps(const Thread* thread) {
  const Machine& m = machine;
  return thread->block == m.sleeping_block && (!m.sleeping_warp || thread->warp == m.sleeping_warp);
}

void choose_sleeper() {
  Machine& m = machine;
  if (m.until_next_sleeper-- > 0) return;
  m.until_next_sleeper = m.draw(uint64_t(16) << m.draw(m.nap_bits));
  m.sleeps_deeply = m.draw(2);
  m.sleeping_block = &m.blocks[m.draw(m.blocks.size())];
  auto& warps = m.sleeping_block->warps;
  m.sleeping_warp = m.draw(2) ? &warps[m.draw(warps.size())] : nullptr;
  m.ready.insert(m.ready.end(), m.asleep.begin(), m.asleep.end());
  m.asleep.clear();
}

Thread* random_thread() {
  Machine& m = machine;
  choose_sleeper();
  if (const size_t under_way = m.letters.size() + m.numbers.size(); under_way && m.draw(4) == 0) {
    const size_t i = m.draw(under_way);
    const bool to_sleeper = i < m.letters.size() && m.letters[i].to.block == m.sleeping_block;
    if (!to_sleeper || m.sleeping_warp) deliver(i);
  }
  for (;;) {
    while (!m.ready.empty()) {
      Thread*& drawn = m.ready[m.draw(m.ready.size())];
      Thread* next = drawn;
      drawn = m.ready.back();
      m.ready.pop_back();
      if (!sleeps(next)) return next;
      m.asleep.push_back(next);
    }
    const size_t under_way = m.letters.size() + m.numbers.size();
    if (under_way && (m.asleep.empty() || m.sleeps_deeply || m.draw(2))) {
      deliver(m.draw(under_way));
    } else if (!m.asleep.empty()) {
      std::swap(m.asleep[m.draw(m.asleep.size())], m.asleep.back());
      Thread* next = m.asleep.back();
      m.asleep.pop_back();
      return next;
    } else {
      return nullptr;
    }
  }
}

// The fiber to go on with; null: none can.
Thread* next_thread() {
  Machine& m = machine;
  if (m.random) return random_thread();
  if (2 * m.first_ready >= m.ready.size()) {
    m.ready.erase(m.ready.begin(), m.ready.begin() + m.first_ready);
    m.first_ready = 0;
  }
  while (m.ready.empty()) {
    if (m.letters.empty() && m.numbers.empty()) return nullptr;
    deliver(0);  // as late as can be
  }
  return m.ready[m.first_ready++];
}

void enter(Thread* next) {
  current = next;
  TORCH_BPTT_ASAN(
      __sanitizer_start_switch_fiber(&machine.fake_stack, next->stack.data(), Stack::kBytes);)
  Context::change(machine.outside, next->context);
  TORCH_BPTT_ASAN(__sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);)
  current = nullptr;
}

// From the running fiber to another one, or outside where there is none. An ended fiber never comes
// back.
void leave(Thread* next) {
  Thread* self = current;
  if (next == self) return;
  current = next;
  TORCH_BPTT_ASAN(__sanitizer_start_switch_fiber(self->ended ? nullptr : &self->fake_stack,
                                                 next ? next->stack.data() : machine.bottom,
                                                 next ? Stack::kBytes : machine.bytes);)
  Context::change(self->context, next ? next->context : machine.outside);
  TORCH_BPTT_ASAN(__sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);)
}

void run_thread() {
  TORCH_BPTT_ASAN(if (const void* bottom; true) {
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!machine.bottom) machine.bottom = bottom, machine.bytes = bytes;  // the first one knows
  })
  machine.body(machine.body_context);
  current->ended = true;
  --current->block->running;
  leave(next_thread());
  __builtin_unreachable();
}

// The running fiber waits until ready_now() is called for it.
void wait(const char* what, const Where& where) {
  current->waits_for = what;
  current->where = where;
  leave(next_thread());
}

// In random order others may go on first.
void let_overtake() {
  if (!machine.random) return;
  ready_now(current);
  leave(next_thread());
}

// The last one to come opens it: all that wait go on.
void meet(Meeting& meeting, int expected, const char* what, const Where& where) {
  if (meeting.waiting.empty()) meeting.expected = expected;
  if (meeting.expected != expected)
    fault("sync_part: threads that meet differ in the number", where);
  if (int(meeting.waiting.size()) + 1 == expected) {
    for (Thread* thread : meeting.waiting) ready_now(thread);
    meeting.waiting.clear();
    return let_overtake();
  }
  meeting.waiting.push_back(current);
  wait(what, where);
}

// ---- blocks from start to end -------------------------------------------------------------------

std::string deadlock() {
  // The same wait of neighbouring threads of a block is one line.
  std::string text = "deadlock:";
  const auto& threads = machine.threads;
  const unsigned per_block = threads[0]->place.block_threads;
  const size_t count = machine.blocks.size() * per_block;
  int lines = 0;
  for (size_t i = 0; i < count;) {
    const Thread& first = *threads[i];
    const auto alike = [&](const Thread& other) {
      if (other.block != first.block || other.ended != first.ended) return false;
      return first.ended ||
             (other.waits_for == first.waits_for && other.where.line() == first.where.line());
    };
    size_t end = i + 1;
    while (end < count && alike(*threads[end])) ++end;
    const auto last = std::to_string(threads[end - 1]->place.thread);
    if (++lines <= 24) {
      text += "\n  " + text_of(first.place) + " threads " + std::to_string(first.place.thread) +
              " to " + last + ": ";
      text += first.ended ? "ended" : std::string(first.waits_for) + " at " + text_of(first.where);
    }
    i = end;
  }
  if (lines > 24) text += "\n  and " + std::to_string(lines - 24) + " more";
  return text;
}

// Runs clusters together, each given by the index of its first block.
void run_together(const Start& start, std::span<const Index> clusters) {
  Machine& m = machine;
  const size_t blocks = clusters.size() * start.cluster, count = blocks * start.threads;
  while (m.threads.size() < count) m.threads.push_back(std::make_unique<Thread>());
  m.ready.clear();
  m.first_ready = 0;
  m.asleep.clear();
  m.until_next_sleeper = 0;
  m.nap_bits = std::bit_width(4 * count);  // at most some 64 turns of every thread
  m.letters.clear();
  m.numbers.clear();
  m.readers.clear();
  m.clusters.assign(clusters.size(), {});
  m.failure.clear();
  // Aligned as on the GPU; each block's memory ends where its allocation does.
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<unsigned char, Free>> shared;
  m.blocks.clear();
  m.blocks.resize(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = m.blocks[b];
    const unsigned rank = unsigned(b % start.cluster);
    const Index& first = clusters[b / start.cluster];
    const size_t bytes = (start.shared_bytes + 127) / 128 * 128;
    if (bytes) shared.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(128, bytes)));
    block.shared = bytes ? shared.back().get() : nullptr;
    block.shared_bytes = start.shared_bytes;
    if (bytes) std::memset(block.shared, 0xff, bytes);  // NaN in every type
    block.running = start.threads;
    block.cluster = &m.clusters[b / start.cluster];
    block.warps.resize(start.threads / 32);
    for (unsigned i = 0; i < start.threads; ++i) {
      const size_t slot = b * start.threads + i;
      Thread& thread = *m.threads[slot];
      thread.place = {i,
                      start.threads,
                      rank,
                      start.cluster,
                      {first[0] + rank, first[1], first[2]},
                      {start.grid[0], start.grid[1], start.grid[2]}};
      thread.block = &block;
      thread.warp = &block.warps[i / 32];
      thread.ended = false;
      thread.copies.clear();
      thread.copy_group = 0;
      TORCH_BPTT_ASAN(thread.fake_stack = nullptr;
                      __asan_unpoison_memory_region(thread.stack.data(), Stack::kBytes);)
      // Not all at the same offset of a page, or they would compete for the same cache lines.
      thread.context.start(thread.stack.data(), Stack::kBytes - slot % 32 * 128);
      ready_now(&thread);
    }
  }
  TORCH_BPTT_ASAN(m.bottom = nullptr;)
  enter(next_thread());
  if (!m.failure.empty()) throw Fault(m.failure);
  if (std::ranges::any_of(m.blocks, [](const Block& block) { return block.running > 0; }))
    throw Fault(deadlock());
}

// ---- mail ---------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& message) {
  machine.failure = message;
  if (current) {
    current->ended = true;
    leave(nullptr);
  }
  __builtin_unreachable();
}

void check_initialised(const Mailbox* box, const Where& where) {
  if (box->arrivals == 0x7fff) fault("a mailbox that was not initialised", where);
}

void wake_readers(const void* what) {
  const auto readers = machine.readers.find(what);
  if (readers == machine.readers.end()) return;
  for (Thread* thread : readers->second) ready_now(thread);
  machine.readers.erase(readers);
}

// Ends the phase if all has come.
void close_phase(Mailbox* box) {
  if (box->pending || box->bytes) return;
  box->parity ^= 1;
  box->pending = box->arrivals;
  wake_readers(box);
}

void deliver_letter(size_t i) {
  auto& letters = machine.letters;
  std::swap(letters[i], letters.front());
  const Letter letter = letters.front();
  letters.pop_front();
  if (letter.to.block->running == 0)
    fail("send at " + text_of(letter.where) + ": the block it goes to has ended");
  std::memcpy(letter.to.address, letter.value, letter.bytes);
  auto* box = reinterpret_cast<Mailbox*>(letter.box.address);
  check_initialised(box, letter.where);
  box->bytes -= letter.bytes;
  close_phase(box);
}

void deliver_number(size_t i) {
  const Number number = machine.numbers[i];
  machine.numbers.erase(machine.numbers.begin() + i);
  *number.flag = number.value;
  wake_readers(number.flag);
}

void check_within(const Remote& remote, int bytes, const Where& where) {
  const auto offset = remote.address - remote.block->shared;
  if (offset < 0 || size_t(offset) + bytes > remote.block->shared_bytes)
    fault("an address outside of shared memory", where);
  check_aligned(remote.address, bytes, where);
}

void check_flag(const uint32_t* flag, const Where& where) {
  const auto* address = reinterpret_cast<const unsigned char*>(flag);
  for (const Block& block : machine.blocks)
    if (address >= block.shared && address < block.shared + block.shared_bytes)
      fault("a flag in shared memory", where);
  check_aligned(flag, sizeof *flag, where);
}

}  // namespace

// ---- the interface ------------------------------------------------------------------------------

void set_schedule_seed(uint64_t seed) {
  chosen_seed = seed;
  seed_chosen = true;
}

void run(const Start& start, void (*body)(void*), void* context) {
  Machine& m = machine;
  if (current) throw Fault("a kernel was started inside a kernel");
  const uint64_t seed = schedule_seed();
  if (seed != m.seed_in_use) {
    m.seed_in_use = seed;
    m.random_state = seed * 0x9e3779b97f4a7c15 | 1;
  }
  m.random = seed != 0;
  m.body = body;
  m.body_context = context;
  const size_t columns = start.grid[0] / start.cluster;
  const size_t clusters = columns * start.grid[1] * start.grid[2];
  std::vector<Index> order(clusters);
  for (size_t i = 0; i < clusters; ++i)
    order[i] = {unsigned(i % columns) * start.cluster, unsigned(i / columns % start.grid[1]),
                unsigned(i / columns / start.grid[1])};
  if (start.whole_grid) return run_together(start, order);
  for (size_t i = clusters; m.random && i > 1; --i) std::swap(order[i - 1], order[m.draw(i)]);
  for (const Index& first : order) run_together(start, {&first, 1});
}

const Place& place() { return current->place; }
unsigned char* shared_memory() { return current->block->shared; }

void fault(const char* message, const Where& where) {
  std::string who;
  if (current)
    who = " (" + text_of(current->place) + " thread " + std::to_string(current->place.thread) + ")";
  fail(text_of(where) + ": " + message + who);
}

void check_aligned(const void* address, size_t bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fault("a misaligned address", where);
}

void check_shared(const void* address, size_t bytes, const Where& where) {
  const Block& block = *current->block;
  const auto offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < 0 || size_t(offset) + bytes > block.shared_bytes)
    fault("an address outside of shared memory", where);
  check_aligned(address, bytes, where);
}

void sync_block(const Where& where) {
  meet(current->block->meetings[0], current->place.block_threads, "sync_block", where);
}

void sync_part(int id, int threads, const Where& where) {
  if (id < 1 || id > 15 || threads <= 0 || threads % 32)
    fault("a part of a block: id 1 to 15 and whole warps", where);
  meet(current->block->meetings[id], threads, "sync_part", where);
}

void sync_cluster(const Where& where) {
  const Place& place = current->place;
  meet(*current->block->cluster, int(place.cluster_blocks * place.block_threads), "sync_cluster",
       where);
}

void warp_together(const char* what, void* mine, void (*combine)(void* const*),
                   const Where& where) {
  Warp& warp = *current->warp;
  if (warp.meeting.waiting.empty()) {
    warp.what = what;
    warp.combine = combine;
  } else if (warp.combine != combine || warp.what != what) {
    fail(text_of(where) + ": some lanes are at " + what + ", others at " + warp.what + " (" +
         text_of(warp.meeting.waiting[0]->where) + ")");
  }
  warp.lanes[current->place.thread % 32] = mine;
  if (warp.meeting.waiting.size() == 31) combine(warp.lanes);
  meet(warp.meeting, 32, what, where);
}

void copy_async(void* shared, const void* global, int bytes, int valid, const Where& where) {
  check_shared(shared, bytes, where);
  check_aligned(global, bytes, where);
  if (valid < 0 || valid > bytes) fault("copy_async: more valid bytes than bytes", where);
  const Copy copy{shared, global, bytes, valid, current->copy_group};
  if (machine.random && machine.draw(2))
    copy.run();
  else
    current->copies.push_back(copy);
}

void commit_copies() { ++current->copy_group; }

void wait_copies(int pending) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    const bool now = copy.group < current->copy_group - pending;
    if (now) copy.run();
    return now;
  });
}

Remote in_block(unsigned rank, const void* own, const Where& where) {
  check_shared(own, 1, where);
  if (rank >= current->place.cluster_blocks) fault("in_block: no block of that rank", where);
  Block& block = (current->block - current->place.cluster_rank)[rank];
  return {&block, block.shared + (static_cast<const unsigned char*>(own) - current->block->shared)};
}

void init_mailbox(Mailbox* box, int arrivals, const Where& where) {
  check_shared(box, sizeof(Mailbox), where);
  *box = {0, uint16_t(arrivals), uint16_t(arrivals), 0};
}

void arrive_expecting(Mailbox* box, int bytes, const Where& where) {
  check_shared(box, sizeof(Mailbox), where);
  check_initialised(box, where);
  if (bytes < 0 || bytes >= 1 << 20) fault("a mailbox counts less than 2^20 bytes", where);
  if (box->pending == 0)
    fault("a mailbox with more arrivals in a phase than it was made for", where);
  box->bytes += bytes;
  --box->pending;
  close_phase(box);
}

void wait_for_mail(Mailbox* box, unsigned parity, const Where& where) {
  check_shared(box, sizeof(Mailbox), where);
  check_initialised(box, where);
  if (parity > 1) fault("wait_for_mail: the parity is 0 or 1", where);
  // Looks again when it is its turn: a phase that has ended twice by then was missed.
  while (box->parity == parity) {
    machine.readers[box].push_back(current);
    wait("wait_for_mail", where);
  }
}

void send(Remote to, const void* value, int bytes, Remote box, const Where& where) {
  check_within(to, bytes, where);
  check_within(box, sizeof(Mailbox), where);
  if (to.block != box.block) fault("send: the mailbox is in another block than the letter", where);
  Letter letter{to, box, bytes, {}, where};
  std::memcpy(letter.value, value, bytes);
  machine.letters.push_back(letter);
}

void publish(uint32_t* flag, uint32_t value, const Where& where) {
  check_flag(flag, where);
  machine.numbers.push_back({flag, value, current->block->cluster});
  let_overtake();  // so that what this thread writes too late is missed
}

void wait_for_flag(const uint32_t* flag, uint32_t value, const Where& where) {
  check_flag(flag, where);
  while (*flag < value) {
    machine.readers[flag].push_back(current);
    wait("wait_for_flag", where);
  }
}

}  // namespace torch_bptt::cuda::host
