// Computes     window = decay*window + weight*v and counts[0] += 1 if every v[u] is finite, else counts[1] += 1, where
//              v[u] comes from t[n, u] = sum_k s[n, entries[k]] / scale over the entries of unit u
//                                                                         see ops/reference.py
// Shapes       sums_i [C_i] or [N, C_i], side by side s [N, P]; entries [E], offsets [U + 1], window [U], counts [2]
// Strides      contiguous
// Dtypes       sums, scale, added, window: fp32 or fp64 (equal); entries, offsets, counts: int64; finite: bool
// Bytes        itemsize*N*E + 8*(E + U) read; itemsize*U written and read, and 4 bytes for each 32 units, between the
//              launches; 2*itemsize*U for the window
// Launches     2; 1 without counts; 1 more for each further 2000 tensors, with N*U sums in between
// Determinism  yes: no atomics; every unit belongs to one block, blocks and shares follow from shapes
// Error        at most 8 eps32 * (sum of the absolute terms)              (tests/gpu)
// Source       arXiv:1906.10771

#include "../units.h"
#include "device.cuh"

namespace taylor {
namespace {

constexpr int kRows = kThreads / kWarp;  // of a block's threads; 32 units lie side by side
constexpr int kSamples = 8;              // of one thread at a time
constexpr int kFewSums = 250;            // most networks: arguments of 4 KiB are cheaper to pass than those of 32
constexpr int kManySums = 2000;          // a kernel's arguments may take 32,764 bytes

// The tensors of a launch by the positions they begin at.
template <int kCapacity>
struct SumsTable {
  const void* sums[kCapacity];
  int64_t first[kCapacity + 1];
  int32_t items;
};

template <typename T>
struct Units {
  const int64_t* entries;
  const int64_t* offsets;
  const T* scale;
  const T* added;
  T* partial;  // [N, U]: sums over the tables of earlier launches; null where there is one table
  T* window;
  T* values;       // [U], for the second launch
  int32_t* flags;  // for each block, whether one of its values is not finite; null where nothing is ever skipped
  int64_t units;
  int64_t count;  // of entries
  int64_t rows;
  int64_t positions;
  T decay;
  T weight;
  UnitReduction reduction;
  bool first_table;
  bool last_table;
};

// One position: its number in row n is at[n * stride].
template <typename T>
struct Column {
  const T* at;
  int64_t stride;
};

template <typename T, int kCapacity>
__device__ __forceinline__ Column<T> column_of(const SumsTable<kCapacity>& table, int64_t position) {
  if (position < table.first[0] || position >= table.first[table.items]) return {nullptr, 0};
  int low = 0, high = table.items - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first[middle] <= position) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t first = table.first[low];
  return {static_cast<const T*>(table.sums[low]) + (position - first), table.first[low + 1] - first};
}

// What a position counts that is in none of this launch's tensors: nothing, or NaN where it is in no tensor at all.
template <typename T>
__device__ __forceinline__ T elsewhere(const Units<T>& p, int64_t position) {
  return position >= 0 && position < p.positions ? T(0) : static_cast<T>(NAN);
}

template <typename T>
__device__ __forceinline__ T blend(const Units<T>& p, T window, T value) {
  return fma(p.decay, window, p.weight * value);
}

// t[n, u] from the sum over this table, and what the reduction makes of it; 0 while there are tables to come.
template <typename T>
__device__ __forceinline__ T term_of(const Units<T>& p, int64_t n, int64_t u, T sum) {
  if (p.partial != nullptr) {
    T& place = p.partial[n * p.units + u];
    if (!p.first_table) sum += place;
    if (!p.last_table) place = sum;
  }
  if (p.scale != nullptr) sum /= *p.scale;
  if (p.reduction == UnitReduction::kSample) return sum * sum;
  return p.reduction == UnitReduction::kAbs ? fabs(sum) : sum;
}

// The sum over a block's rows of threads, in the first of them. All threads take part.
template <typename T>
__device__ __forceinline__ T sum_shares(T value, T (*buffer)[kWarp], int row, int lane) {
  buffer[row][lane] = value;
  __syncthreads();
  T total = 0;
  if (row == 0) {
    for (int r = 0; r < kRows; ++r) total += buffer[r][lane];
  }
  return total;
}

// The rows of threads share the entries of the only row of sums.
template <typename T, int kCapacity>
__device__ __forceinline__ T sum_entries(const SumsTable<kCapacity>& table, const Units<T>& p, int64_t begin,
                                         int64_t end, int row) {
  T sum = 0;
  for (int64_t k = begin + row; k < end; k += kRows) {
    const int64_t position = p.entries[k];
    const Column<T> column = column_of<T>(table, position);
    sum += column.at != nullptr ? *column.at : elsewhere(p, position);
  }
  return sum;
}

// The rows of threads share the rows of sums.
template <typename T, int kCapacity>
__device__ __forceinline__ T sum_samples(const SumsTable<kCapacity>& table, const Units<T>& p, int64_t begin,
                                         int64_t end, int64_t u, int row) {
  T total = 0;
  for (int64_t base = row; base < p.rows; base += kSamples * kRows) {
    T sum[kSamples] = {};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t position = p.entries[k];
      const Column<T> column = column_of<T>(table, position);
      const T missing = column.at != nullptr ? T(0) : elsewhere(p, position);
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        const int64_t n = base + i * kRows;
        sum[i] += column.at != nullptr && n < p.rows ? column.at[n * column.stride] : missing;
      }
    }
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const int64_t n = base + i * kRows;
      if (n < p.rows) total += term_of(p, n, u, sum[i]);
    }
  }
  return total;
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    unit_values_kernel(const __grid_constant__ SumsTable<kCapacity> table, const __grid_constant__ Units<T> p) {
  __shared__ T buffer[kRows][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t u = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const bool active = u < p.units;
  int64_t begin = 0, end = 0;
  if (active && p.positions > 0) {
    begin = p.offsets[u] < 0 ? 0 : p.offsets[u];
    end = lesser(p.offsets[u + 1], p.count);
  }
  T share = 0;
  if (p.rows == 1) {
    share = sum_entries(table, p, begin, end, row);
  } else if (active) {
    share = sum_samples(table, p, begin, end, u, row);
  }
  T value = sum_shares(share, buffer, row, lane);
  if (row != 0) return;  // whole warps
  if (p.rows == 1 && active) value = term_of(p, 0, u, value);
  if (!p.last_table) return;
  if (active && p.added != nullptr) value += p.added[u];
  if (p.reduction == UnitReduction::kBatch) value *= value;
  if (p.flags == nullptr) {
    if (active) p.window[u] = blend(p, p.window[u], value);
    return;
  }
  if (active) p.values[u] = value;
  const int bad = sum_lanes(active && !isfinite(value) ? 1 : 0, kWarp);
  if (lane == 0) p.flags[blockIdx.x] = bad;
}

// Every block looks at all flags: they are few, and no launch has to clear one.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    apply_values_kernel(const __grid_constant__ Units<T> p, int64_t blocks, const bool* finite, int64_t* counts) {
  __shared__ int shared[kRows];
  int bad = finite != nullptr && !*finite ? 1 : 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) bad |= p.flags[i] != 0 ? 1 : 0;
  bad = sum_lanes(bad, kWarp);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = bad;
  __syncthreads();
  bad = 0;
  for (int warp = 0; warp < kRows; ++warp) bad |= shared[warp];
  if (blockIdx.x == 0 && threadIdx.x == 0) counts[bad == 0 ? 0 : 1] += 1;
  const int64_t u = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (bad == 0 && u < p.units) p.window[u] = blend(p, p.window[u], p.values[u]);
}

template <typename T, int kCapacity>
void launch_values(const UnitArguments& a, Units<T> p, unsigned blocks, cudaStream_t stream) {
  size_t i = 0;
  int64_t position = 0;
  do {
    SumsTable<kCapacity> table{};
    table.first[0] = position;
    for (; i < a.sums.size() && table.items < kCapacity; ++i) {
      table.sums[table.items++] = a.sums[i].const_data_ptr();
      table.first[table.items] = position += a.sums[i].size(a.sums[i].dim() - 1);
    }
    p.last_table = i == a.sums.size();
    unit_values_kernel<T, kCapacity><<<blocks, kThreads, 0, stream>>>(table, p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    p.first_table = false;
  } while (i < a.sums.size());
}

template <typename T>
const T* pointer_to(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// No template: nvcc 13.0 writes no host code for a braced argument in one that is assigned.
Tensor new_vector(const Tensor& window, int64_t size, ScalarType type) {
  return torch::stable::new_empty(window, {size}, type);
}

template <typename T>
void run(const UnitArguments& a, cudaStream_t stream) {
  const unsigned blocks = grid_size(std::max<int64_t>(1, ceil_div<int64_t>(a.units(), kWarp)), "accumulate_importance");
  Units<T> p{};
  p.entries = static_cast<const int64_t*>(a.entries.const_data_ptr());
  p.offsets = static_cast<const int64_t*>(a.offsets.const_data_ptr());
  p.scale = pointer_to<T>(a.scale);
  p.added = pointer_to<T>(a.added);
  p.window = static_cast<T*>(a.window.mutable_data_ptr());
  p.units = a.units();
  p.count = a.entries.numel();
  p.rows = a.rows();
  for (const Tensor& sums : a.sums) p.positions += sums.size(sums.dim() - 1);
  p.decay = static_cast<T>(a.decay);
  p.weight = static_cast<T>(a.weight);
  p.reduction = a.reduction;
  p.first_table = true;
  std::optional<Tensor> values, flags, partial;  // alive until everything that uses them is launched
  if (a.counts) {
    values = new_vector(a.window, p.units, a.window.scalar_type());
    flags = new_vector(a.window, blocks, ScalarType::Int);
    p.values = static_cast<T*>(values->mutable_data_ptr());
    p.flags = static_cast<int32_t*>(flags->mutable_data_ptr());
  }
  if (a.sums.size() <= kFewSums) {
    launch_values<T, kFewSums>(a, p, blocks, stream);
  } else {
    if (a.sums.size() > kManySums) {
      partial = new_vector(a.window, p.rows * p.units, a.window.scalar_type());
      p.partial = static_cast<T*>(partial->mutable_data_ptr());
    }
    launch_values<T, kManySums>(a, p, blocks, stream);
  }
  if (!a.counts) return;
  const unsigned groups =
      grid_size(std::max<int64_t>(1, ceil_div<int64_t>(p.units, kThreads)), "accumulate_importance");
  apply_values_kernel<T><<<groups, kThreads, 0, stream>>>(p, blocks, pointer_to<bool>(a.finite),
                                                          static_cast<int64_t*>(a.counts->mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void accumulate_importance_cuda(std::vector<Tensor> sums, Tensor entries, Tensor offsets, Tensor window,
                                std::optional<Tensor> counts, std::string reduction, std::optional<Tensor> scale,
                                std::optional<Tensor> added, std::optional<Tensor> finite, double decay,
                                double weight) {
  const UnitArguments a{std::move(sums), entries, offsets, window, counts, unit_reduction(reduction),
                        scale,           added,   finite,  decay,  weight};
  check_units(a);
  const int32_t device = window.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (window.scalar_type() == ScalarType::Double) {
    run<double>(a, stream);
  } else {
    run<float>(a, stream);
  }
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("accumulate_importance", TORCH_BOX(&taylor::accumulate_importance_cuda));
}
