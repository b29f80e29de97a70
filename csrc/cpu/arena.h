// Scratch memory that a thread keeps from one call to the next. A training loop asks for the same
// few megabytes again and again; given back to the system in between, every page of them would have
// to be found and cleared anew, which took a third of the time of a small backward pass.
#pragma once

#include <cstddef>

namespace torch_bptt::cpu {

// A stack: what was taken last is given back first.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMost = 0;  // so that the ends of every buffer are watched
#else
  static constexpr size_t kMost = size_t{64} << 20;  // kept by a thread; more than that is not
#endif

  static Arena& of_this_thread();
  ~Arena();

  // At least `bytes` bytes, uninitialised. Throws std::bad_alloc.
  void* take(size_t bytes);
  void give(void* memory, size_t bytes);

 private:
  bool owns(const void* memory) const;

  std::byte* base = nullptr;
  size_t capacity = 0;
  size_t used = 0;    // of base
  size_t in_use = 0;  // base or not
  size_t peak = 0;    // the most that was in use since the call began
};

}  // namespace torch_bptt::cpu
