"""``python -m taylor_cuda.bench.frontier``: accuracy against MACs, for this package's criteria and Torch-Pruning's.

**The task.** Images of single characters, hundreds of classes, from the fonts that matplotlib brings: nothing is
downloaded. ``glyphs`` renders every class once in every face; an image is a random face under a random affine map,
contrast, polarity, brightness and noise. Training never sees the same image twice. The test images are of faces that
training never sees, and are the same ones for every seed.

**The network.** ResNet-18 with the stem for small images: 3 × 3, stride 1, no max-pool.

**A point** is one seed, method and budget. Every method starts from the one network that was trained for that seed,
with the same batches in the same order, and takes the same optimizer steps: ``every · prune_steps`` at a constant rate,
a removal after each ``every`` on the cubic schedule; then ``finetune_steps`` on half a cosine. After
every removal the momentum starts anew, for all, because Torch-Pruning replaces the parameters.

- ours: ``tc.Pruner`` with the criterion, by value per cost, and without the moving average over windows, which the peer
  hasn't. ``random`` is the floor: each channel is as likely to go as the other, whatever it costs.
- torch-pruning: its ``MetaPruner``, ``global_pruning=True``, with its group importance as it comes. It removes a share
  of the channels, so it is called until the network costs what is asked, with fewer channels each time, at last one by
  one; a removal that would land more than 1 % below is undone and its layer passed over. Its Taylor importance gets
  the sum of the gradients of the same batches that ours see between two removals.

**What is equal, and checked**: MACs after the last removal, counted by PyTorch's own counter in a real forward pass,
within 1 % of the budget; optimizer steps; finite losses. A point that fails a check has no row. ``tc.Pruner`` can land
too low: the last step of the cubic schedule asks for a thousandth of the way, and one costly channel is more. It then
begins again, asked for half a percent more, at last for one.

**BatchNorm**: running statistics are the moving averages (momentum 0.1) over the training batches. A removal slices
them, nobody takes them anew, and evaluation uses them, before and after, for every method.

**What is measured**: accuracy on the test images of the base network, right after the last removal (there criteria
differ most) and after fine-tuning; seconds of the removals alone, and of the pruning phase with its training steps.

Every finished point is a row of ``bench/results/DEVICE/frontier.jsonl``. A point that has one, with the same settings
and the same base network, isn't run again, so an interrupted run goes on where it was.
"""
