// Every native schema, once. Kernels for the CPU are in csrc/cpu (this library), those for CUDA in csrc/cuda
// (_C_cuda.so); what an op computes is in taylor_cuda/ops/reference.py, whose signatures these are.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(taylor_cuda_native, m) {
  m.def("channel_importance(Tensor activation, Tensor gradient, str reduction=\"batch\") -> Tensor");
  m.def("channel_sums(Tensor activation, Tensor gradient) -> Tensor");
  m.def("accumulate_channel_sums(Tensor activation, Tensor gradient, Tensor(a!) sums) -> ()");
  m.def("weight_importance(Tensor[] weights, Tensor[] gradients, int[] dims, str reduction=\"sum\") -> Tensor[]");
  m.def(
      "accumulate_importance(Tensor[] sums, Tensor entries, Tensor offsets, Tensor(a!) window, Tensor(b!)? counts, "
      "str reduction=\"batch\", Tensor? scale=None, Tensor? added=None, Tensor? finite=None, float decay=1.0, "
      "float weight=1.0) -> ()");
  m.def("keep_mask(Tensor scores, Tensor keep) -> (Tensor, Tensor)");
  m.def(
      "score_relu_backward(Tensor output, Tensor gradient, Tensor(a!) sums, Tensor? skip=None, "
      "Tensor(b!)? skip_sums=None) -> Tensor");
  m.def("pack_channels(Tensor x, Tensor keep) -> Tensor");
  m.def("unpack_channels(Tensor x, Tensor keep, int channels) -> Tensor");
  m.def("gather_kept(Tensor[] tensors, Tensor keep, int[] bounds, bool[] cast, ScalarType dtype) -> Tensor[]");
  m.def("scatter_kept(Tensor[] values, Tensor(a!)[] targets, Tensor keep, int[] bounds, bool clear) -> ()");
}
