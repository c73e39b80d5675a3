// Work that threads share.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace taylor {

// Threads take the next index when they are done with one, so that none waits for a slower one.
template <typename F>
void for_each_index(int64_t count, bool threaded, const F& body) {
  const int64_t threads = threaded ? std::min<int64_t>(torch::stable::get_num_threads(), count) : 1;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, work);
  } else {
    work(0, 1);
  }
}

}  // namespace taylor
