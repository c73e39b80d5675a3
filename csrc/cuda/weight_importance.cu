// Computes     out_i[c] = the sum over w_i[.., c, ..] of  "sum" w*g   "square" (w*g)^2   "abs" |w*g|,  c along dims_i
//                                                                         see ops/reference.py
// Shapes       w_i, g_i any; out_i [C_i], C_i = w_i.size(dims_i)
// Strides      any; 16-byte loads where w and g lie alike, without gaps and with aligned rows, dimensions in any order
// Dtypes       w and g: fp32, fp16, bf16, fp64 (equal), or fp32 w with fp16 or bf16 g. Sums and out: fp32 or fp64
// Bytes        P*(sizeof w + sizeof g) read for P parameters, 4*sum C_i written
// Launches     1 for up to 640 tensors of one pair of types; 1 more for each further 640, for each further pair of
//              types, and for each 200 tensors whose weight and gradient lie differently
// Determinism  yes: no atomics; blocks follow from shapes, strides, types and alignment
// Error        at most 8 eps32 * (sum of the absolute terms)              (tests/gpu)
// Source       arXiv:1906.10771

#include <map>
#include <utility>

#include "device.cuh"
#include "weight_table.h"

namespace taylor {
namespace {

// Accumulates kVector terms for each of kLoads loads, one sum per element of the vector.
template <typename Acc, typename W, typename G, int kVector>
struct Terms {
  static constexpr int kLoads = sizeof(W) * kVector > 16 ? kUnroll / 2 : kUnroll;  // a wide operand takes two loads
  Pack<W, kVector> w[kLoads];
  Pack<G, kVector> g[kLoads];

  __device__ __forceinline__ void load(int u, const W* weight, const G* gradient, bool inside) {
    w[u].load_if(weight, inside);
    g[u].load_if(gradient, inside);
  }

  __device__ __forceinline__ void add_to(Acc (&sum)[kVector], Term term) const {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const Acc product = w[u].get(v) * g[u].get(v);
        sum[v] += term == Term::kProduct ? product : (term == Term::kSquare ? product * product : fabs(product));
      }
    }
  }
};

template <typename Acc, int kVector>
__device__ __forceinline__ Acc total_of(const Acc (&sum)[kVector]) {
  Acc total = 0;
#pragma unroll
  for (int v = 0; v < kVector; ++v) total += sum[v];
  return total;
}

// The sum over a block, in its first thread. All threads take part.
template <typename Acc>
__device__ __forceinline__ Acc sum_block(Acc value, Acc* shared) {
  value = sum_lanes(value, kWarp);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  Acc total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared[warp];
  __syncthreads();
  return total;
}

// outer == 1: segments are runs of `inner` elements, one after another.
template <typename Acc, typename W, typename G, int kVector>
__device__ __forceinline__ void sum_runs(const WeightItem& item, const WeightUnit& unit, Term term, Acc* shared) {
  const int lanes = run_lanes(item.inner, item.vector), lane = threadIdx.x % lanes;
  for (int base = 0; base < unit.count; base += kThreads / lanes) {
    const int segment = base + threadIdx.x / lanes;
    const bool active = segment < unit.count;
    const int64_t start = static_cast<int64_t>(unit.first + segment) * item.inner;
    const W* w = static_cast<const W*>(item.weight) + start;
    const G* g = static_cast<const G*>(item.gradient) + start;
    Acc sum[kVector] = {};
    using Step = Terms<Acc, W, G, kVector>;
    for (int64_t i = lane * kVector; active && i < item.inner; i += Step::kLoads * kVector * lanes) {
      Step terms;
#pragma unroll
      for (int u = 0; u < Step::kLoads; ++u) {
        const int64_t at = i + u * kVector * lanes;
        terms.load(u, w + at, g + at, at < item.inner);
      }
      terms.add_to(sum, term);
    }
    Acc total = total_of(sum);
    total = lanes <= kWarp ? sum_lanes(total, lanes) : sum_block(total, shared);
    if (active && lane == 0) static_cast<Acc*>(item.out)[unit.first + segment] = total;
  }
}

// outer > 1: columns are summed down the rows, then neighbouring columns of one segment.
template <typename Acc, typename W, typename G, int kVector>
__device__ __forceinline__ void sum_slab(const WeightItem& item, const WeightUnit& unit, Term term, Acc* shared) {
  const Slab slab = slab_of(item, unit);
  const int row = threadIdx.x / slab.across, column = threadIdx.x % slab.across * kVector;
  if (row < slab.down) {
    const W* w = static_cast<const W*>(item.weight) + slab.start + column;
    const G* g = static_cast<const G*>(item.gradient) + slab.start + column;
    Acc sum[kVector] = {};
    using Step = Terms<Acc, W, G, kVector>;
    for (int r = row; r < item.outer; r += Step::kLoads * slab.down) {
      Step terms;
#pragma unroll
      for (int u = 0; u < Step::kLoads; ++u) {
        const int64_t at = r + u * slab.down;
        terms.load(u, w + at * slab.stride, g + at * slab.stride, at < item.outer);
      }
      terms.add_to(sum, term);
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) shared[row * slab.columns + column + v] = sum[v];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < slab.columns; c += kThreads) {
    Acc sum = 0;
    for (int r = 0; r < slab.down; ++r) sum += shared[r * slab.columns + c];
    shared[c] = sum;  // read and written by this thread only
  }
  __syncthreads();
  for (int segment = threadIdx.x; segment < unit.count; segment += kThreads) {
    Acc sum = 0;
    for (int k = 0; k < item.inner; ++k) sum += shared[segment * item.inner + k];
    static_cast<Acc*>(item.out)[unit.first + segment] = sum;
  }
}

template <typename W, typename G, int kWide>
__global__ void __launch_bounds__(kThreads, 3) weights_kernel(const __grid_constant__ WeightTable table, Term term) {
  using Acc = Accumulator<W>;
  __shared__ Acc shared[kThreads * kWide];
  const WeightItem& item = table.item[find_item(table, blockIdx.x)];
  const WeightUnit unit = weight_unit(item, blockIdx.x);
  if (item.outer == 1 && item.vector > 1) {
    sum_runs<Acc, W, G, kWide>(item, unit, term, shared);
  } else if (item.outer == 1) {
    sum_runs<Acc, W, G, 1>(item, unit, term, shared);
  } else if (item.vector > 1) {
    sum_slab<Acc, W, G, kWide>(item, unit, term, shared);
  } else {
    sum_slab<Acc, W, G, 1>(item, unit, term, shared);
  }
}

// A warp for each segment.
template <typename W, typename G>
__global__ void __launch_bounds__(kThreads)
    strided_weights_kernel(const __grid_constant__ StridedTable table, Term term) {
  using Acc = Accumulator<W>;
  const StridedItem& item = table.item[find_item(table, blockIdx.x)];
  const int64_t segment = static_cast<int64_t>(blockIdx.x - item.first_unit) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (segment >= item.segment.size) return;  // a whole warp
  const W* w = static_cast<const W*>(item.weight) + segment * item.segment.stride_a;
  const G* g = static_cast<const G*>(item.gradient) + segment * item.segment.stride_g;
  const int64_t length = rest_length(item);
  Acc sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x % kWarp; i < length; i += kWarp) {
    int64_t at_w, at_g;
    strided_offsets(item, i, at_w, at_g);
    const Acc product = static_cast<Acc>(w[at_w]) * static_cast<Acc>(g[at_g]);
    sum += term == Term::kProduct ? product : (term == Term::kSquare ? product * product : fabs(product));
  }
  sum = sum_lanes(sum, kWarp);
  if (threadIdx.x % kWarp == 0) static_cast<Acc*>(item.out)[segment] = sum;
}

// The tensors of one pair of types.
struct Batch {
  std::vector<WeightItem> dense;
  std::vector<StridedItem> strided;
};

template <typename W, typename G>
void launch_batch(const Batch& batch, Term term, cudaStream_t stream) {
  constexpr int kWide = 16 / lesser(sizeof(W), sizeof(G));
  for (const WeightTable& table : tables_of<WeightTable>(batch.dense, kTableItems)) {
    weights_kernel<W, G, kWide><<<table.units, kThreads, 0, stream>>>(table, term);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (const StridedTable& table : tables_of<StridedTable>(batch.strided, kStridedItems)) {
    strided_weights_kernel<W, G><<<table.units, kThreads, 0, stream>>>(table, term);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename F>
void for_pair(ScalarType w, ScalarType g, const F& f) {
  if (w == ScalarType::Double) return f(double(), double());
  if (w == ScalarType::Half) return f(Half(), Half());
  if (w == ScalarType::BFloat16) return f(BFloat16(), BFloat16());
  if (g == ScalarType::Half) return f(float(), Half());
  if (g == ScalarType::BFloat16) return f(float(), BFloat16());
  f(float(), float());
}

Tensor new_scores(const Tensor& weight, int64_t size) {
  const int64_t stride = 1;
  const ScalarType type = result_type(weight.scalar_type());
  const int32_t code = type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;  // the C call: one of these for each tensor, so the dispatcher's price would show
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, code, aoti_torch_device_type_cuda(),
                                                  weight.get_device_index(), &handle));
  return Tensor(handle);
}

void append(Batch& batch, const Walk& walk, const Tensor& weight, const Tensor& gradient, const Tensor& out) {
  void* const place = out.mutable_data_ptr();
  WeightItem item{weight.const_data_ptr(), gradient.const_data_ptr(), place, 0, 0, 0, 0, 1, 0};
  const size_t narrow = std::min(weight.element_size(), gradient.element_size());
  if (planning::dense_form(walk, item) && planning::divide(item, static_cast<int>(16 / narrow))) {
    batch.dense.push_back(item);
    return;
  }
  StridedItem strided = planning::strided_form(walk);
  strided.weight = item.weight;
  strided.gradient = item.gradient;
  strided.out = place;
  batch.strided.push_back(strided);
}

std::vector<Tensor> weight_importance_cuda(std::vector<Tensor> weights, std::vector<Tensor> gradients,
                                           std::vector<int64_t> dims, std::string reduction) {
  const Term term = weight_reduction(reduction);
  STD_TORCH_CHECK(weights.size() == gradients.size() && weights.size() == dims.size(),
                  "weight_importance: weights, gradients and dims differ in length");
  std::vector<Tensor> scores;
  if (weights.empty()) return scores;
  const int32_t device = weights[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::map<std::pair<ScalarType, ScalarType>, Batch> batches;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t dim = check_weight_pair(weights[i], gradients[i], dims[i]);
    STD_TORCH_CHECK(weights[i].is_cuda() && weights[i].get_device_index() == device,
                    "weight_importance: all tensors must be on one device");
    scores.push_back(new_scores(weights[i], weights[i].size(dim)));
    if (weights[i].size(dim) == 0) continue;
    Walk walk = walk_weight(weights[i], gradients[i], dim);
    if (walk.rest.size() > kWeightLoops) {  // too many dimensions that don't merge for a table: copied
      weights[i] = torch::stable::contiguous(weights[i]);
      gradients[i] = torch::stable::contiguous(gradients[i]);
      walk = walk_weight(weights[i], gradients[i], dim);
    }
    append(batches[{weights[i].scalar_type(), gradients[i].scalar_type()}], walk, weights[i], gradients[i], scores[i]);
  }
  const cudaStream_t stream = current_stream(device);
  for (const auto& entry : batches) {
    for_pair(entry.first.first, entry.first.second,
             [&](auto w, auto g) { launch_batch<decltype(w), decltype(g)>(entry.second, term, stream); });
  }
  return scores;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("weight_importance", TORCH_BOX(&taylor::weight_importance_cuda));
}
