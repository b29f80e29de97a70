#include "arena.h"

#include <algorithm>
#include <functional>
#include <new>
#include <utility>

namespace torch_bptt::cpu {

namespace {

std::byte* allocate(size_t bytes) {
  return static_cast<std::byte*>(::operator new(bytes, std::align_val_t{Arena::kAlignment}));
}
void release(void* memory) { ::operator delete(memory, std::align_val_t{Arena::kAlignment}); }

size_t whole_lines(size_t bytes) {
  return (std::max<size_t>(bytes, 1) + Arena::kAlignment - 1) / Arena::kAlignment *
         Arena::kAlignment;
}

}  // namespace

Arena& Arena::of_this_thread() {
  static thread_local Arena arena;
  return arena;
}

Arena::~Arena() { release(base); }

void* Arena::take(size_t bytes) {
  bytes = whole_lines(bytes);
  if (in_use == 0) {  // a new call: make room for as much as the last one needed
    if (peak > capacity && peak <= kMost) {
      release(std::exchange(base, nullptr));
      capacity = 0;
      base = allocate(peak);
      capacity = peak;
    }
    peak = 0;
  }
  void* memory;
  if (bytes <= capacity - used) {
    memory = base + used;
    used += bytes;
  } else {
    memory = allocate(bytes);
  }
  in_use += bytes;
  peak = std::max(peak, in_use);
  return memory;
}

void Arena::give(void* memory, size_t bytes) {
  bytes = whole_lines(bytes);
  in_use -= bytes;
  if (owns(memory))
    used -= bytes;
  else
    release(memory);
}

bool Arena::owns(const void* memory) const {
  // std::less, because the pointers may belong to different objects.
  const std::less<const void*> before;
  return base && !before(memory, base) && before(memory, base + capacity);
}

}  // namespace torch_bptt::cpu
