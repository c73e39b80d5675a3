#include "planner.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>

// The same algorithm as taylor_cuda/planning/greedy.py, where it is described and where the lazy heap
// is proved exact. No expression here multiplies and adds floats in one go: a compiler that contracts
// those into fused multiply-adds would change the last bit, and with it a tie, and a plan.

namespace taylor_cuda::planner {
namespace {

struct Move {
  int64_t group;
  int64_t count;
};
using Moves = std::vector<Move>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("planner: ") + what);
}

void check(const Problem& p) {
  const size_t groups = p.sizes.size();
  require(p.first.size() == groups && p.lowest.size() == groups && p.quantum.size() == groups &&
              p.joined.size() == groups && p.values.size() == groups,
          "one entry a group is wanted of sizes, first, lowest, quantum, joined and values");
  for (size_t g = 0; g < groups; ++g) {
    require(p.values[g].size() == static_cast<size_t>(p.sizes[g]), "one value a unit is wanted");
    require(0 <= p.lowest[g] && p.lowest[g] <= p.first[g] && p.first[g] <= p.sizes[g],
            "0 <= lowest <= first <= size is wanted");
    require(p.quantum[g] >= 1, "a quantum is at least 1");
    require(p.joined[g] < static_cast<int64_t>(groups), "a group is joined to none there is");
  }
  require(p.constants.size() == p.widths.size(), "one constant a factor is wanted");
  for (const auto& row : p.widths) {
    for (const auto& [group, width] : row) {
      require(0 <= group && group < static_cast<int64_t>(groups), "a factor names no group");
      require(width >= 0, "a width is negative");
    }
  }
  for (const auto& product : p.products) {
    for (const int64_t factor : product) {
      require(0 <= factor && factor < static_cast<int64_t>(p.constants.size()), "a term names no factor");
    }
  }
  require(p.limits.size() == p.coefficients.size() && p.originals.size() == p.limits.size(),
          "one limit and one original a cost are wanted");
  for (const auto& row : p.coefficients) {
    require(row.size() == p.products.size(), "one coefficient a term is wanted");
  }
}

class State {
 public:
  explicit State(const Problem& problem)
      : p(problem),
        counts(problem.sizes),
        totals(problem.limits.size(), 0),
        entered(problem.sizes.size(), false),
        members(problem.sizes.size()),
        lengths_(problem.constants),
        elements_(problem.products.size(), 1),
        factors_of_(problem.sizes.size()),
        terms_of_(problem.sizes.size()),
        falls_(problem.limits.size(), 0),
        seen_(problem.products.size(), 0) {
    std::vector<std::vector<int64_t>> terms_of_factor(p.constants.size());
    for (size_t f = 0; f < p.widths.size(); ++f) {
      for (const auto& [group, width] : p.widths[f]) {
        lengths_[f] += width * counts[group];
        factors_of_[group].emplace_back(static_cast<int64_t>(f), width);
      }
    }
    for (size_t t = 0; t < p.products.size(); ++t) {
      for (const int64_t factor : p.products[t]) terms_of_factor[factor].push_back(t);
      elements_[t] = product(t);
      for (size_t b = 0; b < totals.size(); ++b) totals[b] += p.coefficients[b][t] * elements_[t];
    }
    for (size_t g = 0; g < counts.size(); ++g) {
      auto& terms = terms_of_[g];
      for (const auto& entry : factors_of_[g]) {
        const auto& more = terms_of_factor[entry.first];
        terms.insert(terms.end(), more.begin(), more.end());
      }
      std::sort(terms.begin(), terms.end());
      terms.erase(std::unique(terms.begin(), terms.end()), terms.end());
      if (p.joined[g] >= 0) members[p.joined[g]].push_back(static_cast<int64_t>(g));
    }
  }

  bool off(int64_t g) const { return p.sizes[g] % p.quantum[g] != 0; }

  // The next removal of a group is the common one of the joined set it is the least of.
  bool opens(int64_t g) const { return p.joined[g] == g && !entered[g]; }

  void down(int64_t item, Moves& moves) const {
    moves.clear();
    const int64_t least = p.joined[item];
    if (least >= 0 && !entered[least]) {
      if (least != item) return;
      for (const int64_t g : members[least]) {
        if (off(g)) moves.push_back({g, p.first[g]});
      }
      return;
    }
    const int64_t count = counts[item];
    const int64_t lower = count == p.sizes[item] ? p.first[item] : count - p.quantum[item];
    if (p.lowest[item] <= lower && lower < count) moves.push_back({item, lower});
  }

  void up(int64_t g, Moves& moves) const {
    moves.clear();
    if (!below_top(g)) return;
    moves.push_back({g, counts[g] == p.first[g] ? p.sizes[g] : counts[g] + p.quantum[g]});
  }

  void up_together(int64_t least, Moves& moves) const {
    moves.clear();
    if (!entered[least]) return;
    for (const int64_t g : members[least]) {
      if (below_top(g)) {
        moves.clear();
        return;
      }
      if (off(g)) moves.push_back({g, p.sizes[g]});
    }
  }

  double value(const Moves& moves) const {
    double total = 0.0;
    for (const Move& move : moves) {
      const auto& values = p.values[move.group];
      const int64_t size = p.sizes[move.group];
      const int64_t low = size - std::max(counts[move.group], move.count);
      const int64_t high = size - std::min(counts[move.group], move.count);
      for (int64_t i = low; i < high; ++i) total += values[i];
    }
    return total;
  }

  // How much each cost falls with these moves; they are carried out where apply is set.
  const std::vector<int64_t>& falls(const Moves& moves, bool apply = false) {
    shift(moves, -1);
    std::fill(falls_.begin(), falls_.end(), 0);
    ++round_;
    for (const Move& move : moves) {
      for (const int64_t t : terms_of_[move.group]) {
        if (seen_[t] == round_) continue;
        seen_[t] = round_;
        const int64_t after = product(t);
        for (size_t b = 0; b < falls_.size(); ++b) {
          falls_[b] += p.coefficients[b][t] * (elements_[t] - after);
        }
        if (apply) elements_[t] = after;
      }
    }
    if (apply) {
      for (size_t b = 0; b < falls_.size(); ++b) totals[b] -= falls_[b];
      for (const Move& move : moves) counts[move.group] = move.count;
    } else {
      shift(moves, 1);
    }
    return falls_;
  }

  std::vector<size_t> unmet() const {
    std::vector<size_t> result;
    for (size_t b = 0; b < totals.size(); ++b) {
      if (totals[b] > p.limits[b]) result.push_back(b);
    }
    return result;
  }

  const Problem& p;
  std::vector<int64_t> counts;
  std::vector<int64_t> totals;
  std::vector<bool> entered;
  std::vector<std::vector<int64_t>> members;  // of a joined set, at the index of its least group

 private:
  bool below_top(int64_t g) const {
    const int64_t top = p.joined[g] >= 0 && off(g) ? p.first[g] : p.sizes[g];
    return counts[g] < top;
  }

  void shift(const Moves& moves, int64_t sign) {
    for (const Move& move : moves) {
      const int64_t removed = counts[move.group] - move.count;
      for (const auto& [factor, width] : factors_of_[move.group]) {
        lengths_[factor] += sign * width * removed;
      }
    }
  }

  int64_t product(size_t t) const {
    int64_t result = 1;
    for (const int64_t factor : p.products[t]) result *= lengths_[factor];
    return result;
  }

  std::vector<int64_t> lengths_;
  std::vector<int64_t> elements_;
  std::vector<std::vector<std::pair<int64_t, int64_t>>> factors_of_;
  std::vector<std::vector<int64_t>> terms_of_;
  std::vector<int64_t> falls_;
  std::vector<uint64_t> seen_;
  uint64_t round_ = 0;
};

constexpr double kLast = std::numeric_limits<double>::infinity();

// Sets what a removal is ordered by, least first. False: there is none, or it saves nothing.
bool find_priority(State& state, int64_t item, const std::vector<size_t>& unmet, Moves& moves, double& priority) {
  state.down(item, moves);
  if (moves.empty()) return false;
  const std::vector<int64_t>& falls = state.falls(moves);
  if (std::none_of(unmet.begin(), unmet.end(), [&](size_t b) { return falls[b] != 0; })) {
    // Savings only fall, so it never will, but what opens a joined set lets other groups move.
    priority = kLast;
    return state.opens(item);
  }
  const double value = state.value(moves);
  if (!state.p.per_cost) {
    int64_t units = 0;
    for (const Move& move : moves) units += state.counts[move.group] - move.count;
    priority = value / static_cast<double>(units);
    return true;
  }
  double saving = 0.0;
  for (const size_t b : unmet) {
    const double part = static_cast<double>(falls[b]) / static_cast<double>(state.p.originals[b]);
    saving += part;
  }
  priority = value >= 0 ? value / saving : value * saving;
  return true;
}

void remove_units(State& state) {
  using Item = std::pair<double, int64_t>;
  std::priority_queue<Item, std::vector<Item>, std::greater<Item>> heap;
  std::vector<size_t> unmet = state.unmet();
  Moves moves;
  double priority = 0.0;
  const auto offer = [&](int64_t item) {
    if (find_priority(state, item, unmet, moves, priority)) heap.emplace(priority, item);
  };
  for (size_t g = 0; g < state.counts.size(); ++g) offer(static_cast<int64_t>(g));
  while (!unmet.empty()) {
    require(!heap.empty(), "the limits don't hold even at the lowest counts");
    const int64_t item = heap.top().second;
    heap.pop();
    if (!find_priority(state, item, unmet, moves, priority)) continue;
    if (!heap.empty() && heap.top() < Item(priority, item)) {
      heap.emplace(priority, item);
      continue;
    }
    const bool opens = state.opens(item);
    state.falls(moves, /*apply=*/true);
    unmet = state.unmet();
    if (opens) {
      state.entered[item] = true;
      for (const int64_t g : state.members[item]) offer(g);
    } else {
      offer(item);
    }
  }
}

void give_back(State& state) {
  // Highest value first, then the first group. The last entry: a common removal of a joined set.
  using Item = std::tuple<double, int64_t, bool>;
  std::priority_queue<Item, std::vector<Item>, std::greater<Item>> heap;
  Moves moves;
  const auto offer = [&](int64_t group, bool common) {
    common ? state.up_together(group, moves) : state.up(group, moves);
    if (moves.empty()) return;
    const double value = state.value(moves);
    if (value > 0) heap.emplace(-value, group, common);
  };
  const int64_t groups = static_cast<int64_t>(state.counts.size());
  for (int64_t g = 0; g < groups; ++g) offer(g, false);
  for (int64_t g = 0; g < groups; ++g) {
    if (!state.members[g].empty()) offer(g, true);
  }
  while (!heap.empty()) {
    const auto [negated, group, common] = heap.top();
    heap.pop();
    common ? state.up_together(group, moves) : state.up(group, moves);
    const std::vector<int64_t>& falls = state.falls(moves);
    bool holds = true;
    for (size_t b = 0; b < falls.size(); ++b) {
      if (state.totals[b] - falls[b] > state.p.limits[b]) holds = false;
    }
    if (!holds) continue;
    state.falls(moves, /*apply=*/true);
    if (common) continue;
    offer(group, false);
    if (state.p.joined[group] >= 0) offer(state.p.joined[group], true);
  }
}

}  // namespace

std::vector<int64_t> solve(const Problem& problem) {
  check(problem);
  State state(problem);
  remove_units(state);
  give_back(state);
  return state.counts;
}

}  // namespace taylor_cuda::planner
