// What the plans take a device for, each number once. Estimates from published figures of an H100
// and H200, to be replaced by measurements on the device itself.
#pragma once

namespace torch_bptt::cuda {

constexpr double kClock = 1.7;      // cycles for each nanosecond
constexpr double kLaunchNs = 2000;  // from one kernel of a stream to the next
// Of the host, outside CUDA graphs: a kernel; a product of PyTorch, with the views that it is of.
constexpr double kHostLaunchNs = 2700, kHostProductNs = 6000;

// A chunk of 16 units by 8 rows (tiles.h) on one of four schedulers, and without tensor cores.
constexpr double kTensorCycles = 6.3, kPlainCycles = 40;

// Of a multiprocessor.
constexpr double kSharedBytesPerCycle = 128;
constexpr double kCacheBytesPerNs = 45;     // from the second-level cache
constexpr double kWeightBytesPerNs = 20;    // the same in pieces of 4 bytes
constexpr double kExchangeBytesPerNs = 21;  // from the others of its cluster

}  // namespace torch_bptt::cuda
