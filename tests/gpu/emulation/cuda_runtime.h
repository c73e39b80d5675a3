// CUDA on a CPU, as far as the kernels of csrc/cuda use it: every thread of a block is a fiber, and they take turns at
// barriers. Blocks run one after another, so races between blocks don't show; those within a block do, because the
// order of turns can be reversed (EMULATED_ORDER=1) and then what one thread reads before another has written it is
// something else.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
using cudaError_t = int;
using std::fabs;
using std::fma;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline cudaError_t cudaGetLastError() { return 0; }

// A load from an address that is no multiple of its size: a GPU faults, so the process ends.
template <typename T>
inline T __ldg(const T* source) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof(T) != 0) {
    std::fprintf(stderr, "a load of %zu bytes off its border\n", sizeof(T));
    std::abort();
  }
  return *source;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline double __hiloint2double(uint32_t high, uint32_t low) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct HalfBits {
  unsigned short bits;
};
inline HalfBits __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(HalfBits half) {
  const int sign = half.bits >> 15, exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  float value = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction + 1024), exponent - 25);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  return sign != 0 ? -value : value;
}

namespace emulate {

struct Index {
  unsigned x;
};

enum class State { kRunnable, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool entered = false;
  State state = State::kRunnable;
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned current = 0;
  unsigned char slots[1024][16];  // what lanes hand each other
};

inline Block& block() {
  static Block instance;
  return instance;
}

}  // namespace emulate

inline emulate::Index threadIdx, blockIdx;

namespace emulate {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStack = 64 * 1024;

inline void wait(State state) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(b.scheduler, 1);
}

inline void enter() {
  for (;;) {
    block().body();
    wait(State::kDone);
  }
}

inline void run(unsigned thread) {
  Block& b = block();
  Fiber& fiber = b.fibers[thread];
  b.current = threadIdx.x = thread;
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  getcontext(&fiber.context);
  fiber.stack = std::make_unique<char[]>(kStack);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Lets on the threads from `first` to `last` if all of them are at the barrier. A warp barrier is one of all 32 lanes.
inline bool release(unsigned first, unsigned last, State barrier) {
  Block& b = block();
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (b.fibers[i].state == State::kDone && barrier == State::kAtBlockBarrier) continue;
    if (b.fibers[i].state != barrier) return false;
    any = true;
  }
  for (unsigned i = first; i < last; ++i) {
    if (b.fibers[i].state == barrier) b.fibers[i].state = State::kRunnable;
  }
  return any;
}

inline void run_block(unsigned threads, bool reversed) {
  Block& b = block();
  for (unsigned i = 0; i < threads; ++i) b.fibers[i].state = State::kRunnable;
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = reversed ? threads - 1 - i : i;
      if (b.fibers[thread].state != State::kRunnable) continue;
      run(thread);
      progress = true;
    }
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
      progress = release(warp, warp + kWarpSize, State::kAtWarpBarrier) || progress;
    }
    progress = release(0, threads, State::kAtBlockBarrier) || progress;
  }
  for (unsigned i = 0; i < threads; ++i) {
    if (b.fibers[i].state != State::kDone) throw std::runtime_error("a barrier that not all threads reach");
  }
}

inline void launch(unsigned grid, unsigned threads, const std::function<void()>& body) {
  Block& b = block();
  if (b.fibers.size() < 1024) b.fibers = std::vector<Fiber>(1024);
  b.body = body;
  const char* order = std::getenv("EMULATED_ORDER");
  for (unsigned i = 0; i < grid; ++i) {
    blockIdx.x = i;
    run_block(threads, order != nullptr && order[0] == '1');
  }
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::State::kAtBlockBarrier); }

// Hands the value of lane `source` of the warp to this one.
template <typename T>
inline T read_lane(T value, unsigned source) {
  emulate::Block& b = emulate::block();
  const unsigned thread = threadIdx.x, first = thread - thread % emulate::kWarpSize;
  std::memcpy(b.slots[thread], &value, sizeof(T));
  emulate::wait(emulate::State::kAtWarpBarrier);
  T result;
  std::memcpy(&result, b.slots[first + source], sizeof(T));
  emulate::wait(emulate::State::kAtWarpBarrier);
  return result;
}

template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return read_lane(value, lane % 32);
}

template <typename T>
inline T __shfl_down_sync(unsigned, T value, int distance) {
  const unsigned lane = threadIdx.x % 32;
  return read_lane(value, lane + distance < 32 ? lane + distance : lane);
}

template <typename T>
inline T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return read_lane(value, lane >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  emulate::Block& b = emulate::block();
  const unsigned thread = threadIdx.x, first = thread - thread % emulate::kWarpSize;
  b.slots[thread][0] = vote;
  emulate::wait(emulate::State::kAtWarpBarrier);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < emulate::kWarpSize; ++lane) votes |= unsigned(b.slots[first + lane][0]) << lane;
  emulate::wait(emulate::State::kAtWarpBarrier);
  return votes;
}

inline uint32_t atomicAdd(uint32_t* place, uint32_t value) {
  const uint32_t before = *place;
  *place += value;
  return before;
}
