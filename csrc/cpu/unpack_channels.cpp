// unpack_channels on the CPU.

#include "cpu/mapped_copy.h"
#include "kept.h"

namespace taylor {
namespace {

Tensor unpack_channels_cpu(const Tensor& x, const Tensor& keep, int64_t channels) {
  constexpr const char* op = "unpack_channels";
  check_unpacked(x, keep, channels);
  const Tensor y = empty_laid_as(x, with_channels(x, channels));
  Copy copy{x.const_data_ptr(), y.mutable_data_ptr(), x.scalar_type(), y.scalar_type(), axes_between(x, y), true};
  Axis& channel = copy.axes[1];
  channel.source = scattered(static_cast<const int64_t*>(keep.const_data_ptr()), keep.size(0), channels, op);
  channel.mapped = true;
  run_copies({std::move(copy)});
  return y;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("unpack_channels", TORCH_BOX(&taylor::unpack_channels_cpu));
}
