// Sums of products over all dimensions but one, of many pairs of tensors at once: the arithmetic of every CPU op.
//
// Computes     result[n, c] = Σ f(a·g) over all other dimensions, f(p) = p, p² or |p|; or result[c], summed over n as
//              well; or such a result for each of several f
// Numerics     fp64 sums; the product of two 16-bit floats is taken in fp32, any other in fp64 (both exact for fp32 and
//              narrower)
// Bytes        both tensors once; the partial sums stay below 2 % of that
// Determinism  the work is cut by shape alone and every piece has its own place: any number of threads gives the same
//              bits
// Dispatch     csrc/cpu/product_kernels.h compiled for the baseline, AVX2 and AVX-512; the CPU decides at run time

#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "common.h"

namespace taylor {

struct Job {
  const void* a = nullptr;
  const void* g = nullptr;
  ScalarType type_a = ScalarType::Float;
  ScalarType type_g = ScalarType::Float;
  Walk walk;
  Term term = Term::kProduct;
  bool per_sample = false;  // result [N, C] instead of [C]

  int64_t plane_size() const { return (per_sample ? walk.sample.size : 1) * walk.channel.size; }
  int64_t result_size() const { return planes_of(term) * plane_size(); }
};

// The results of all jobs; job i's begins at data() + offset(i).
class Sums {
 public:
  explicit Sums(const std::vector<Job>& jobs);
  double* at(size_t job) const { return values_.get() + offsets_[job]; }

 private:
  std::vector<int64_t> offsets_;
  std::unique_ptr<double[]> values_;
};

Sums product_sums(const std::vector<Job>& jobs);

// The job of a channel op; samples are kept apart if per_sample.
Job channel_job(const Tensor& activation, const Tensor& gradient, Term term, bool per_sample);

// A contiguous result on the CPU, float64 or float32, from fp64 values.
Tensor to_tensor(std::initializer_list<int64_t> shape, ScalarType type, const double* values);

}  // namespace taylor
