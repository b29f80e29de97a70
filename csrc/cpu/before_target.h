// What a file of kernels includes ahead of its target: headers that other files share, so that none
// of their inline functions is compiled for one instruction set and then linked into code for
// another.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>

#include "arena.h"
#include "kernels.h"
