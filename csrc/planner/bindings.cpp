#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "planner.h"

namespace py = pybind11;

namespace {

using taylor_cuda::planner::Problem;

// Read by attribute, so that the Python dataclass is the only place that says what the fields are.
Problem read_problem(const py::object& source) {
  Problem problem;
  const auto read = [&source](const char* name, auto& field) {
    field = source.attr(name).cast<std::decay_t<decltype(field)>>();
  };
  read("sizes", problem.sizes);
  read("first", problem.first);
  read("lowest", problem.lowest);
  read("quantum", problem.quantum);
  read("joined", problem.joined);
  read("values", problem.values);
  read("constants", problem.constants);
  read("widths", problem.widths);
  read("products", problem.products);
  read("coefficients", problem.coefficients);
  read("originals", problem.originals);
  read("limits", problem.limits);
  read("per_cost", problem.per_cost);
  return problem;
}

std::vector<int64_t> solve(const py::object& source) {
  const Problem problem = read_problem(source);
  const py::gil_scoped_release released;
  return taylor_cuda::planner::solve(problem);
}

}  // namespace

PYBIND11_MODULE(_planner, module) {
  module.doc() = "The compiled solver behind tc.plan.";
  module.def("solve", &solve, py::arg("problem"),
             "The kept count of every group, as taylor_cuda.planning.greedy.solve.");
}
