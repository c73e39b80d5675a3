// Cuts the jobs into pieces of about equal size, runs them on all threads, and adds up what belongs together.

#include "cpu/product_sums.h"

#include <deque>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace taylor {
namespace {

constexpr int64_t kShortRow = 16;              // shorter rows are summed side by side, as columns
constexpr int64_t kInlineSize = 1 << 14;       // elements below which waking a second thread costs more than it saves
constexpr int64_t kInlineAdditions = 1 << 18;  // the same for sums that are in the cache
constexpr int64_t kLeastRows = 96;  // rows of a piece of columns: clearing and folding its sums is work of one row

using KernelOf = Kernel (*)(ScalarType type_a, ScalarType type_g, Term term);

KernelOf best_kernels() {
#if TAYLOR_X86
  if (best_instructions() == Instructions::kAvx512) return avx512::kernel_of;
  if (best_instructions() == Instructions::kAvx2) return avx2::kernel_of;
#endif
  return baseline::kernel_of;
}

Kernel kernel_for(const Job& job) {
  static const KernelOf kernel_of = best_kernels();
  return kernel_of(job.type_a, job.type_g, job.term);
}

bool strides_are(const Loop& loop, int64_t stride_a, int64_t stride_g) {
  return loop.stride_a == stride_a && loop.stride_g == stride_g;
}

bool strides_are(const Loop& loop, int64_t stride) { return strides_are(loop, stride, stride); }

int64_t positions(const std::vector<Loop>& loops) {
  int64_t count = 1;
  for (const Loop& loop : loops) count *= loop.size;
  return count;
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How one job is walked: the path, and its dimensions in the order that suits it.
struct Layout {
  Path path = Path::kStrided;
  Loop sample;
  Loop channel;
  std::vector<Loop> rest;
  int64_t fold = 1;
};

void sum_samples_too(const Job& job, Layout& layout) {
  if (job.per_sample) return;
  layout.rest.push_back(layout.sample);
  layout.rest = merged(layout.rest);
  layout.sample = Loop{};
}

Layout layout_of(const Job& job) {
  Layout layout{Path::kStrided, job.walk.sample, job.walk.channel, job.walk.rest, 1};
  if (layout.rest.empty()) sum_samples_too(job, layout);
  const bool samples_follow = layout.sample.stride_a == layout.channel.size * layout.channel.stride_a &&
                              layout.sample.stride_g == layout.channel.size * layout.channel.stride_g;
  if (layout.rest.empty() && samples_follow) {
    layout.channel.size *= layout.sample.size;
    layout.sample = Loop{};
  }
  const Loop inner = layout.rest.empty() ? Loop{} : layout.rest.back();
  const bool ends_meet = layout.rest.empty() || strides_are(inner, layout.channel.size);
  if (strides_are(layout.channel, 1) && (layout.channel.size >= 8 || ends_meet)) {
    layout.path = Path::kColumns;
    sum_samples_too(job, layout);
  } else if (!layout.rest.empty() && strides_are(inner, 1) && strides_are(layout.channel, inner.size) &&
             inner.size < kShortRow) {
    layout.path = Path::kColumns;
    layout.fold = inner.size;
    layout.rest.pop_back();
    sum_samples_too(job, layout);
  } else if (!layout.rest.empty() && strides_are(inner, 1)) {
    layout.path = Path::kRows;
  } else if (!layout.rest.empty() && strides_are(inner, 0, 1)) {
    layout.path = Path::kRowsRepeatA;
  } else if (!layout.rest.empty() && strides_are(inner, 1, 0)) {
    layout.path = Path::kRowsRepeatG;
  }
  return layout;
}

struct Task {
  Kernel kernel;
  const void* a;
  const void* g;
  Piece piece;
  double* out;
  int64_t size;  // elements
};

// rows[k][c] for k in [0, count) add up to results[c].
struct Addition {
  const double* rows;
  double* results;
  int64_t count;
  int64_t channels;
};

// Channels of one piece, and positions of the longest loop in one piece.
struct Cut {
  int64_t channels;
  int64_t longest = -1;  // index of the loop that is split, or -1
  int64_t step = 0;
  int64_t chunks = 1;
};

Cut cut_of(const Layout& layout) {
  const int64_t all = positions(layout.rest);
  const int64_t channels = layout.channel.size;
  Cut cut{channels};
  int64_t wanted;  // positions of one piece
  if (layout.path == Path::kColumns) {
    const int64_t blocks = ceil_div(channels * layout.fold, kMaxWidth / layout.fold * layout.fold);
    cut.channels = std::min(channels, std::min(ceil_div(ceil_div(channels, blocks), 8) * 8, kMaxWidth / layout.fold));
    wanted = std::max<int64_t>(kPieceSize / (cut.channels * layout.fold), kLeastRows);
  } else {
    const int64_t least = layout.path == Path::kStrided ? std::min(kStridedBlock, channels) : 1;
    cut.channels = std::min(channels, std::max(kPieceSize / all / least * least, least));
    wanted = std::max<int64_t>(kPieceSize / cut.channels, 1);
  }
  if (all > wanted) {
    cut.longest = 0;
    for (size_t i = 1; i < layout.rest.size(); ++i) {
      if (layout.rest[i].size > layout.rest[cut.longest].size) cut.longest = static_cast<int64_t>(i);
    }
    const int64_t size = layout.rest[cut.longest].size;
    cut.chunks = ceil_div(size, std::max<int64_t>(size * wanted / all, 1));
    cut.step = ceil_div(size, cut.chunks);
    cut.chunks = ceil_div(size, cut.step);
  }
  return cut;
}

class Plan {
 public:
  void add(const Job& job, double* results);
  void run();

 private:
  void add_chunk(const Job& job, Layout& layout, const Cut& cut, int64_t chunk, double* partial, int64_t plane);

  std::deque<std::vector<Loop>> loops_;  // a deque, for tasks point into it
  std::vector<std::unique_ptr<double[]>> partials_;
  std::vector<Task> tasks_;
  std::vector<Addition> additions_;
  int64_t elements_ = 0;
};

void Plan::add(const Job& job, double* results) {
  Layout layout = layout_of(job);
  const int64_t all = positions(layout.rest);
  elements_ += layout.sample.size * layout.channel.size * layout.fold * all;
  if (layout.channel.size == 0) return;
  if (layout.sample.size * all == 0) {
    std::fill(results, results + job.result_size(), 0.0);
    return;
  }
  const Cut cut = cut_of(layout);
  const int64_t width = layout.channel.size;
  const int64_t kept = job.per_sample ? layout.sample.size : 1;   // rows of the results
  const int64_t summed = layout.sample.size * cut.chunks / kept;  // rows of partial sums for each
  const int64_t rows = planes_of(job.term) * kept;                // of results
  double* partial = results;
  if (summed > 1) {
    partials_.emplace_back(new double[rows * summed * width]);
    partial = partials_.back().get();
    for (int64_t r = 0; r < rows; ++r) {
      additions_.push_back({partial + r * summed * width, results + r * width, summed, width});
    }
  }
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    add_chunk(job, layout, cut, chunk, partial, kept * summed * width);
  }
}

void Plan::add_chunk(const Job& job, Layout& layout, const Cut& cut, int64_t chunk, double* partial, int64_t plane) {
  loops_.push_back(chunk + 1 < cut.chunks ? layout.rest : std::move(layout.rest));
  std::vector<Loop>& loops = loops_.back();
  int64_t offset_a = 0, offset_g = 0;
  if (cut.longest >= 0) {
    Loop& longest = loops[cut.longest];
    const int64_t begin = chunk * cut.step;
    offset_a = begin * longest.stride_a;
    offset_g = begin * longest.stride_g;
    longest.size = std::min(cut.step, longest.size - begin);
  }
  const bool columns = layout.path == Path::kColumns;
  const int64_t row = cut.channels * layout.fold;
  int64_t run = row;
  if (columns && !loops.empty() && cut.channels == layout.channel.size && strides_are(loops.back(), row)) {
    run *= loops.back().size;  // the rows lie end to end
    loops.pop_back();
  }
  const int64_t repeats = run / row;
  const int64_t inner = columns || loops.empty() ? 1 : loops.back().size;
  const int64_t outer = positions(loops) / inner;
  for (int64_t n = 0; n < layout.sample.size; ++n) {
    double* out = partial + (n * cut.chunks + chunk) * layout.channel.size;
    for (int64_t c = 0; c < layout.channel.size; c += cut.channels) {
      Piece piece;
      piece.path = layout.path;
      piece.offset_a = offset_a + n * layout.sample.stride_a + c * layout.channel.stride_a;
      piece.offset_g = offset_g + n * layout.sample.stride_g + c * layout.channel.stride_g;
      piece.channels = std::min(cut.channels, layout.channel.size - c);
      piece.fold = layout.fold;
      piece.run = piece.channels * layout.fold * repeats;
      piece.width = piece.channels * layout.fold * std::max<int64_t>(std::min(repeats, kGoodWidth / row), 1);
      piece.channel = layout.channel;
      piece.loops = loops.data();
      piece.loop_count = static_cast<int>(loops.size());
      piece.outer = outer;
      piece.plane = plane;
      const int64_t size = outer * (columns ? piece.run : piece.channels * inner);
      tasks_.push_back({kernel_for(job), job.a, job.g, piece, out + c, size});
    }
  }
}

void Plan::run() {
  const bool threaded = elements_ > kInlineSize;
  // The largest first, so that no thread begins one when the others are about to be done.
  if (threaded) {
    std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& x, const Task& y) { return x.size > y.size; });
  }
  for_each_index(static_cast<int64_t>(tasks_.size()), threaded, [this](int64_t i) {
    const Task& task = tasks_[i];
    task.kernel(task.a, task.g, task.piece, task.out);
  });
  int64_t added = 0;
  for (const Addition& addition : additions_) added += addition.count * addition.channels;
  for_each_index(static_cast<int64_t>(additions_.size()), added > kInlineAdditions, [this](int64_t i) {
    const Addition& addition = additions_[i];
    std::copy(addition.rows, addition.rows + addition.channels, addition.results);
    for (int64_t k = 1; k < addition.count; ++k) {
      const double* row = addition.rows + k * addition.channels;
      for (int64_t c = 0; c < addition.channels; ++c) addition.results[c] += row[c];
    }
  });
}

}  // namespace

Sums::Sums(const std::vector<Job>& jobs) {
  int64_t total = 0;
  for (const Job& job : jobs) {
    offsets_.push_back(total);
    total += job.result_size();
  }
  values_.reset(new double[total]);
}

Sums product_sums(const std::vector<Job>& jobs) {
  Sums sums(jobs);
  Plan plan;
  for (size_t i = 0; i < jobs.size(); ++i) plan.add(jobs[i], sums.at(i));
  plan.run();
  return sums;
}

Job channel_job(const Tensor& activation, const Tensor& gradient, Term term, bool per_sample) {
  return {activation.const_data_ptr(),
          gradient.const_data_ptr(),
          activation.scalar_type(),
          gradient.scalar_type(),
          walk_activation(activation, gradient),
          term,
          per_sample};
}

Tensor to_tensor(std::initializer_list<int64_t> shape, ScalarType type, const double* values) {
  const auto* sizes = shape.begin();  // [C] or [N, C]
  const int64_t strides[2] = {shape.size() == 2 ? sizes[1] : 1, 1};
  const bool wide = type == ScalarType::Double;
  // Straight from the shim: the dispatcher takes longer to make the result of a small layer than the sums take.
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), sizes, strides,
                                                  wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  const int64_t count = result.numel();
  if (wide) {
    std::copy(values, values + count, static_cast<double*>(result.mutable_data_ptr()));
  } else {
    float* out = static_cast<float*>(result.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(values[i]);
  }
  return result;
}

}  // namespace taylor
