// Copies between tensors whose dimensions differ in what they keep: the arithmetic of the CPU ops on kept channels.
//
// Computes     to[i, j, ...] = from[source_0[i], source_1[j], ...], and 0 (or nothing) where a source is -1
// Numerics     bits as they are, or one cast as PyTorch does it
// Bytes        what is kept is read once, the destination written once; nothing else is touched
// Determinism  every element has one writer: any number of threads gives the same bits

#pragma once

#include <cstdint>
#include <vector>

#include "common.h"

namespace taylor {

// Where the places of a dimension of the destination come from: places of the other tensor, or -1.
using Source = std::vector<int32_t>;

// source[k] = list[k]: what a gather takes. Raises for what is not among `size` places.
Source gathered(const int64_t* list, int64_t count, int64_t size, const char* op);

// source[list[k]] = k, and -1 elsewhere: its inverse.
Source scattered(const int64_t* list, int64_t count, int64_t size, const char* op);

// A dimension, as the destination has it. Strides are in elements.
struct Axis {
  int64_t size = 1;
  int64_t stride_from = 0;
  int64_t stride_to = 0;
  Source source;        // empty: place i comes from place i
  bool mapped = false;  // whether source says so
};

struct Copy {
  const void* from = nullptr;
  void* to = nullptr;
  ScalarType type_from = ScalarType::Float;
  ScalarType type_to = ScalarType::Float;
  std::vector<Axis> axes;
  bool clear = true;  // 0 where there is no source; else what was there stays
};

// Axes of the destination's sizes, none of them mapped yet.
std::vector<Axis> axes_between(const Tensor& from, const Tensor& to);

// Runs all of them, on all threads.
void run_copies(std::vector<Copy> copies);

}  // namespace taylor
