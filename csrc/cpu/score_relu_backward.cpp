// score_relu_backward on the CPU: the backward pass of score_relu.
//
// Computes     gx = 0 where output <= 0, else gradient; sums += Σ output·gradient; skip_sums += Σ skip·gx
// Numerics     gx bit for bit; fp64 sums of products that are exact for fp32 and narrower, as in product_sums.h
// Bytes        output, gradient and skip once, gx written; the partial sums stay below 2 % of that for 100 positions
//              and more. A gradient that is neither contiguous nor channels_last as the output is, is copied first
// Determinism  the work is cut by shape alone and every piece has its own place: any number of threads, the same bits

#include <algorithm>
#include <memory>

#include "cpu/relu_table.h"
#include "relu.h"

namespace taylor {
namespace {

constexpr int64_t kInlineSize = 1 << 14;     // elements below which waking a second thread costs more than it saves
constexpr int64_t kBlockOfChannels = 1024;   // fp64 sums of output and skip that stay in the L1 cache
constexpr int64_t kLeastRowsOfColumns = 96;  // clearing and adding up the sums of a piece is work of one row

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

ReluKernel kernel_for(ScalarType type, const ReluWork& work) {
  static const Instructions instructions = best_instructions();
#if TAYLOR_X86
  if (instructions == Instructions::kAvx512) return avx512::relu_kernel_of(type, work.skip != nullptr, work.columns);
  if (instructions == Instructions::kAvx2) return avx2::relu_kernel_of(type, work.skip != nullptr, work.columns);
#endif
  return baseline::relu_kernel_of(type, work.skip != nullptr, work.columns);
}

bool is_dense(const Loop& loop) { return loop.size == 1 || (loop.stride_a == 1 && loop.stride_g == 1); }

// Whether one of the two paths takes the walk; sets the loops and the path.
bool set_path(ReluWork& work, const Walk& walk) {
  if (walk.rest.size() > 1) return false;
  work.sample = walk.sample;
  work.channel = walk.channel;
  work.position = walk.rest.empty() ? Loop{} : walk.rest[0];
  const bool rows = !walk.rest.empty() && is_dense(work.position);
  work.columns = !rows && is_dense(work.channel);
  return rows || work.columns;
}

// A piece and the row of partial sums that it fills.
struct Task {
  ReluPiece piece;
  int64_t offset;
};

// Partial sums are [kept][summed][C]: `summed` rows make one row of the result.
struct Cut {
  std::vector<Task> tasks;
  int64_t kept = 1;
  int64_t summed = 1;
};

Cut cut_rows(const ReluWork& work, bool per_sample) {
  const int64_t samples = work.sample.size, rows = samples * work.channel.size;
  const int64_t step = std::max<int64_t>(kPieceSize / work.position.size, 1);
  Cut cut{{}, per_sample ? samples : 1, per_sample ? 1 : samples};
  for (int64_t row = 0; row < rows; row += step) {
    ReluPiece piece;
    piece.first_row = row;
    piece.rows = std::min(step, rows - row);
    cut.tasks.push_back({piece, row});
  }
  return cut;
}

Cut cut_columns(const ReluWork& work, bool per_sample) {
  const int64_t samples = work.sample.size, positions = work.position.size, channels = work.channel.size;
  const int64_t block = std::min(channels, kBlockOfChannels);
  const int64_t wanted = std::max(kPieceSize / block, kLeastRowsOfColumns);
  const int64_t chunks = ceil_div(positions, wanted), step = ceil_div(positions, chunks);
  const int64_t together = per_sample ? 1 : std::max<int64_t>(wanted / positions, 1);
  Cut cut{{}, per_sample ? samples : 1, 0};
  int64_t row = 0;
  for (int64_t n = 0; n < samples; n += together) {
    for (int64_t l = 0; l < positions; l += step, ++row) {
      for (int64_t c = 0; c < channels; c += block) {
        ReluPiece piece;
        piece.first_sample = n;
        piece.samples = std::min(together, samples - n);
        piece.first_position = l;
        piece.positions = std::min(step, positions - l);
        piece.first_channel = c;
        piece.channels = std::min(block, channels - c);
        cut.tasks.push_back({piece, row * channels + c});
      }
    }
  }
  cut.summed = row / cut.kept;
  return cut;
}

template <typename F>
void for_each_task(const std::vector<Task>& tasks, bool threaded, const F& body) {
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(tasks[i]);
  };
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (threaded && count > 1) {
    torch::stable::parallel_for(0, count, 1, work);
  } else {
    work(0, count);
  }
}

template <typename T>
void add(const Tensor& sums, const Cut& cut, int64_t channels, const double* partial) {
  T* out = static_cast<T*>(sums.mutable_data_ptr());
  std::vector<double> row(channels);
  for (int64_t k = 0; k < cut.kept; ++k, out += channels) {
    std::copy(partial, partial + channels, row.begin());
    partial += channels;
    for (int64_t i = 1; i < cut.summed; ++i, partial += channels) {
      for (int64_t c = 0; c < channels; ++c) row[c] += partial[c];
    }
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<T>(static_cast<double>(out[c]) + row[c]);
  }
}

void add_to(const Tensor& sums, const Cut& cut, int64_t channels, const double* partial) {
  if (sums.scalar_type() == ScalarType::Double) return add<double>(sums, cut, channels, partial);
  add<float>(sums, cut, channels, partial);
}

Tensor run(Relu relu, const Tensor& sums, const std::optional<Tensor>& skip_sums) {
  ReluWork work;
  if (!set_path(work, relu.walk)) {
    relu.gradient = laid_as(relu.gradient, relu.gx);
    if (!set_path(work, walk_activation(relu.gx, relu.gradient))) {
      Tensor gx = relu.gx;
      torch::stable::copy_(gx, run(in_order(relu), sums, skip_sums));
      return gx;
    }
  }
  work.output = relu.output.const_data_ptr();
  work.gradient = relu.gradient.const_data_ptr();
  work.skip = relu.skip.has_value() ? relu.skip->const_data_ptr() : nullptr;
  work.gx = relu.gx.mutable_data_ptr();
  const bool per_sample = sums.dim() == 2;
  const Cut cut = work.columns ? cut_columns(work, per_sample) : cut_rows(work, per_sample);
  const int64_t channels = work.channel.size, places = cut.kept * cut.summed * channels;
  const std::unique_ptr<double[]> partial(new double[places]), partial_skip(new double[work.skip ? places : 0]);
  const ReluKernel kernel = kernel_for(relu.gx.scalar_type(), work);
  for_each_task(cut.tasks, relu.gx.numel() > kInlineSize, [&](const Task& task) {
    kernel(work, task.piece, partial.get() + task.offset, work.skip ? partial_skip.get() + task.offset : nullptr);
  });
  add_to(sums, cut, channels, partial.get());
  if (skip_sums.has_value()) add_to(*skip_sums, cut, channels, partial_skip.get());
  return relu.gx;
}

Tensor score_relu_backward_cpu(const Tensor& output, const Tensor& gradient, const Tensor& sums,
                               std::optional<Tensor> skip, std::optional<Tensor> skip_sums) {
  check_relu(output, gradient, sums, skip, skip_sums);
  if (output.numel() == 0) return torch::stable::empty_like(output);
  return run(relu_of(output, gradient, skip), sums, skip_sums);
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("score_relu_backward", TORCH_BOX(&taylor::score_relu_backward_cpu));
}
