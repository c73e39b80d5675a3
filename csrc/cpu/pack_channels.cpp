// pack_channels on the CPU.

#include "cpu/mapped_copy.h"
#include "kept.h"

namespace taylor {
namespace {

Tensor pack_channels_cpu(const Tensor& x, const Tensor& keep) {
  constexpr const char* op = "pack_channels";
  check_channels(x, keep, op);
  const Tensor y = empty_laid_as(x, with_channels(x, keep.size(0)));
  Copy copy{x.const_data_ptr(), y.mutable_data_ptr(), x.scalar_type(), y.scalar_type(), axes_between(x, y), true};
  Axis& channel = copy.axes[1];
  channel.source = gathered(static_cast<const int64_t*>(keep.const_data_ptr()), keep.size(0), x.size(1), op);
  channel.mapped = true;
  run_copies({std::move(copy)});
  return y;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("pack_channels", TORCH_BOX(&taylor::pack_channels_cpu));
}
