"""``python -m taylor_cuda.bench.coverage``: what this package can prune of which network, beside Torch-Pruning.

For every network, with random weights, a batch of two, float32, on the CPU:

* **trace**: seconds of ``tc.trace`` with the proof of every group, after one forward pass to warm up. Where a busy
  machine gave the process less than 80 % of that, the seconds of processor too; the promise is about the lesser.
* **share**: elements of the parameters that some member of an offered group lies in, of all parameters.
* **MACs**: multiply-accumulates of the network after ``tc.cut`` by a ``tc.plan`` for ``macs=0.6`` with random scores,
  of those before, counted by PyTorch's own counter in real forward passes.
* **difference**: between the cut network and two others: the whole network under ``tc.masked``, and a copy in which the
  weights that read a dropped channel were zeroed by hand. The greatest over two cuts, that of the plan and a random one
  of every group, and over all outputs, relative to the greatest value of each; in train mode too where that has outputs
  of its own. Every parameter that starts at a constant (heads, layer scales, γ and β) is random and the statistics of
  BatchNorm are those of data, so that no channel is without effect.
* **verdict**: ``ok`` the difference is rounding (at most 1e-4; a wrong channel is of order 1) and the cut did change
  the outputs; ``wrong`` it isn't; ``error`` something raised.

Torch-Pruning is given the same network and the names of the layers that write the outputs, which we find out, and its
own pruner removes a quarter of every group at random. Its time is that of its dependency graph and groups, which proves
nothing. Its share counts the parameters whose shape changed. **wrong** means: it pruned without an error, but the
pruned network raises in its forward pass, or computes something else than the network before in which, in every
convolution, linear layer and attention, the weights of the input channels it removed there are zero and every LayerNorm
takes its statistics over what it kept. So an attention whose heads became narrower is wrong where its logits are now
scaled by another head width. **over 60 s**: finding groups, or pruning, took longer than that.
"""
