"""Images per second of whole networks: training, training with scores at every step, and both after half is cut."""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from taylor_cuda.bench.largest import MULTIPLE, largest_batch, most_elements
from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, make
from taylor_cuda.bench.training import RATE, RepeatedStep, allocated, examples, flat, memory_format
from taylor_cuda.graph import masked, trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.pruner import Pruner

TRAINING, INFERENCE = "training", "inference"
WHOLE, SCORED, CUT = "torch", "ours:taylor_fo", "ours:cut"
BUDGET = {"macs": 0.5}
BATCHES = (256, 64, 1)
"""Of inference."""

PRUNING_BATCH = 64
"""Examples in the step whose scores decide what is cut."""

LARGEST = "largest batch"
ON_A_GPU = "resnet50 batch 256 at 224"
ON_A_CPU = "resnet18 batch 8 at 64"
"""The training steps that promises are about."""

INDEXED = 2**31 - 1
"""Elements that a tensor may have: beyond this, kernels count in 64 bits, or not at all."""


@dataclass(frozen=True)
class Halved:
    """A network before and after a real cut to half of its multiply-accumulates; both on the host, in training mode.

    Attributes:
        whole: after one step of training.
        cut: the same weights, without the channels that scored lowest.
        groups: of the whole one.
        keep: what was kept of each group.
        macs_ratio: of the cut one to the whole one.
        seconds: that planning, cutting and comparing took.
    """

    whole: nn.Module
    cut: nn.Module
    groups: Groups
    keep: dict[str, Tensor]
    macs_ratio: float
    seconds: float


def pruner_of(step: RepeatedStep, every: int, options: Options) -> Pruner:
    """A pruner that runs the backward passes of a step, and prunes once.

    Autocast leaves the parameters in float32, so widths that tensor cores want have to be asked for.
    """
    round_to = 8 if options.cuda and not options.quick else 1
    pruner = Pruner(step.model, step.x[:1], step.optimizer, BUDGET, every=every, steps=1, round_to=round_to)
    step.backward = pruner
    return pruner


@functools.lru_cache(maxsize=2)
def halved(network: str, size: int, options: Options) -> Halved:
    """Cut a network as the pruning loop does: one scored step, then plan, cut, and comparison with the masked one."""
    found = _halved(network, size, options)
    gc.collect()  # what is left of its optimizer would count as memory of whoever comes next
    return found


def _halved(network: str, size: int, options: Options) -> Halved:
    groups = trace(make(network), images(1, size))
    step = RepeatedStep(make(network), examples(2 if options.quick else PRUNING_BATCH, size, options), options)
    pruner = pruner_of(step, 1, options)
    before = pruner.cost.macs
    step()
    whole = make(network)
    whole.load_state_dict(step.model.state_dict())
    _wait(options)
    start = time.perf_counter()
    plan = pruner.step()
    _wait(options)
    seconds = time.perf_counter() - start
    assert plan is not None
    keep = {name: kept.cpu() for name, kept in plan.keep.items()}
    return Halved(whole, step.model.cpu(), groups, keep, plan.cost.macs / before, seconds)


def _wait(options: Options) -> None:
    if options.cuda:
        torch.cuda.synchronize()


def note_of(found: Halved) -> str:
    """What a reader of the cut network's rows has to know."""
    return f"{found.macs_ratio:.3f} of the MACs after one cut, which took {found.seconds:.2f} s with its plan and check"


def training(key: Key, network: str, batch: int | None, size: int, options: Options) -> Race:
    """The race of whole steps, of the largest batch that fits where none is given."""
    found = halved(network, size, options)
    # A sample is long enough where the batch is as large as it can be.
    calls = 4 if options.cuda and not options.quick and batch is not None else 1
    says = ""
    if batch is None:
        batch, says = _largest(found.whole, size, options)
    before = allocated(options)
    data = examples(batch, size, options)
    # A loop has no others to share its images with.
    trained = partial(_trained, data=data, data_bytes=allocated(options) - before, options=options)
    providers = [
        trained(WHOLE, found.whole, 1.0, f"batch {batch}{says}, the plain step"),
        trained(SCORED, found.whole, 1.0, f"batch {batch}{says}, scores at each step"),
        trained(CUT, found.cut, found.macs_ratio, f"batch {batch}{says}, {note_of(found)}"),
    ]
    seconds = None if options.quick else 9.0
    return Race(key, providers, peer=WHOLE, rounds=40, seconds=seconds, calls=calls, images=batch)


def _trained(
    name: str,
    model: nn.Module,
    macs_ratio: float,
    note: str,
    data: tuple[Tensor, Tensor],
    data_bytes: int,
    options: Options,
) -> Provider:
    """Steps of one network, the first of which has to move the weights as plain PyTorch does."""
    moved, allowed = by_hand(copy.deepcopy(model), data, options)
    before = allocated(options)
    step = RepeatedStep(copy.deepcopy(model), data, options)
    pruner = pruner_of(step, 1_000_000, options) if name == SCORED else None

    def run(_input: object) -> Tensor:
        loss = step()
        if pruner is not None:
            pruner.step()
        return loss

    def check(_loss: Tensor, _index: int) -> float:
        if pruner is not None:
            scores = torch.cat(list(pruner.importance.scores().values()))
            if not bool(scores.isfinite().all() and (scores > 0).any()):
                return float("nan")
        return float((step.flat_parameters() - moved).norm()) / allowed

    built = allocated(options) - before + data_bytes
    return Provider(name, run, check, note, built_bytes=built, macs_ratio=macs_ratio)


def by_hand(model: nn.Module, data: tuple[Tensor, Tensor], options: Options) -> tuple[Tensor, float]:
    """The weights after one step written out in plain PyTorch, and how far off another one may be.

    In 16 bits, rounding in another order may turn a fifth of the movement; on a CPU a thousandth.
    """
    model.to(device=options.device).to(memory_format=memory_format(options))
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    start = flat(model)
    x, y = data
    with torch.autocast(x.device.type, torch.bfloat16, enabled=options.cuda):
        loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    optimizer.step()
    moved = flat(model)
    return moved, (0.2 if options.cuda else 1e-3) * float((moved - start).norm())


def _largest(model: nn.Module, size: int, options: Options) -> tuple[int, str]:
    """The largest batch of a plain step, and what of it isn't for want of memory."""
    counted = INDEXED // most_elements(copy.deepcopy(model), images(1, size))
    most = 4 if options.quick else counted // MULTIPLE * MULTIPLE
    step = RepeatedStep(copy.deepcopy(model), examples(1, size, options), options)
    one = step.x

    def run(batch: int) -> None:
        step.x = one.expand(batch, -1, -1, -1).clone(memory_format=memory_format(options))
        step.y = step.y[:1].expand(batch)
        step()

    batch = largest_batch(run, most)
    return batch, " (a larger one has more elements than 32 bits count)" if batch == most else ""


def inference(key: Key, network: str, batch: int, size: int, options: Options) -> Race:
    """The race of forward passes, in the type that a network is deployed in."""
    found = halved(network, size, options)
    x, _ = examples(batch, size, options)
    expected = _expected(found, x, options)
    dtype = torch.bfloat16 if options.cuda else torch.float32
    narrow = x.to(dtype)
    share = 0.05 if options.cuda else 1e-4

    def provider(name: str, model: nn.Module, macs_ratio: float, note: str) -> Provider:
        before = allocated(options)
        timed = copy.deepcopy(model).eval().to(device=options.device, dtype=dtype)
        timed.to(memory_format=memory_format(options))
        right = expected[name]

        @torch.inference_mode()
        def run(_input: object) -> Tensor:
            result: Tensor = timed(narrow)
            return result

        def check(result: Tensor, _index: int) -> float:
            return float((result.float() - right).norm() / (share * right.norm()))

        return Provider(name, run, check, note, built_bytes=allocated(options) - before, macs_ratio=macs_ratio)

    providers = [
        provider(WHOLE, found.whole, 1.0, "the whole network"),
        provider(CUT, found.cut, found.macs_ratio, note_of(found)),
    ]
    seconds = 1.0 if options.cuda and not options.quick else None
    timers = ("graph", "eager")
    return Race(key, providers, peer=WHOLE, rounds=50, seconds=seconds, timers=timers, images=batch)


def _expected(found: Halved, x: Tensor, options: Options) -> dict[str, Tensor]:
    """Logits in float32 of the whole network, and of the same one with the dropped channels masked."""
    model = copy.deepcopy(found.whole).eval().to(options.device)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        whole: Tensor = model(x)
        with masked(model, found.groups, found.keep):
            kept: Tensor = model(x)
    return {WHOLE: whole, CUT: kept}


def entries(options: Options) -> list[Entry]:
    """ResNet-50 and ResNet-101 on a GPU; something small where there is none."""
    # (network, batch, size, batches of inference, priorities of: training, inference, training with the largest batch)
    wanted: list[tuple[str, int, int, tuple[int, ...], tuple[int, int, int]]]
    if options.quick:
        wanted = [("tiny", 2, 64, (2, 1), (28, 28, 28))]
    elif options.cuda:
        wanted = [("resnet50", 256, 224, BATCHES, (9, 9, 12)), ("resnet101", 256, 224, BATCHES, (9, 12, 12))]
    else:
        wanted = [("resnet18", 8, 64, (8, 1), (61, 61, 61))]
    return [
        entry
        for network, batch, size, batches, priorities in wanted
        for entry in _entries(network, batch, size, batches, priorities, options)
    ]


def _entries(
    network: str, batch: int, size: int, batches: Sequence[int], priorities: Sequence[int], options: Options
) -> Iterator[Entry]:
    dtype, layout = ("bfloat16", "channels_last") if options.cuda else ("float32", "nchw")

    def entry(op: str, count: int | None, priority: int, seconds: float) -> Entry:
        case = f"{network} {LARGEST if count is None else f'batch {count}'} at {size}"
        build: Callable[..., Race] = training if op == TRAINING else inference
        made = partial(build, network=network, batch=count, size=size, options=options)
        names = (WHOLE, SCORED, CUT) if op == TRAINING else (WHOLE, CUT)
        key = Key("throughput", op, case, dtype, layout)
        return Entry(key, made, names, priority, 1.0 if options.quick else seconds)

    yield entry(TRAINING, batch, priorities[0], 20.0)
    for count in batches:
        yield entry(INFERENCE, count, priorities[1], 4.0)
    if options.cuda:
        yield entry(TRAINING, None, priorities[2], 30.0)
