// Which units to keep so that a model meets its budgets at the least predicted loss. Plain C++17: no
// Python, no torch.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace taylor_cuda::planner {

// The fields are those of taylor_cuda.planning.problem.Problem, which documents them.
struct Problem {
  std::vector<int64_t> sizes;
  std::vector<int64_t> first;
  std::vector<int64_t> lowest;
  std::vector<int64_t> quantum;
  std::vector<int64_t> joined;
  std::vector<std::vector<double>> values;
  std::vector<int64_t> constants;
  std::vector<std::vector<std::pair<int64_t, int64_t>>> widths;
  std::vector<std::vector<int64_t>> products;
  std::vector<std::vector<int64_t>> coefficients;
  std::vector<int64_t> originals;
  std::vector<int64_t> limits;
  bool per_cost = true;
};

// The kept count of every group. Bit for bit what taylor_cuda.planning.greedy.solve returns.
// Throws std::invalid_argument where the fields don't fit together or no counts meet the limits.
std::vector<int64_t> solve(const Problem& problem);

}  // namespace taylor_cuda::planner
