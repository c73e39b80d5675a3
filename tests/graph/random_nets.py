"""What ``trace`` offers of a random network must hold: cut == masked, in fp64, by nothing of ``prove.py``.

``python -m tests.graph.random_nets 1000`` checks the networks of seeds 0 to 999 and prints what came out; a second
number is the first seed.
"""

from __future__ import annotations

import copy
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor, nn

import taylor_cuda as tc
from tests.graph.checks import outputs
from tests.graph.draw_nets import Program, draw_program

# fp64 has 1e-16; the deepest of these networks and a norm over two equal channels take five digits of it
TOLERANCE = 1e-9


class WrongCutError(AssertionError):
    """An offered group doesn't hold."""


@dataclass
class Outcome:
    """What came of one network: parameters in it, how many of them are in offered groups, channels frozen by reason."""

    params: int = 0
    offered: int = 0
    channels: int = 0
    frozen: Counter[str] = field(default_factory=Counter)


def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter and buffer at random: nothing is zero, nothing hides behind a small scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif tensor.dim() > 1:
            values /= max(1, tensor[0].numel()) ** 0.5
        tensor.data = values


def random_keeps(groups: tc.Groups, seed: int) -> Iterator[dict[str, Tensor]]:
    """One unit of every group, all but one, and random numbers of random units of random groups."""
    generator = torch.Generator().manual_seed(seed)

    def draw(group: tc.ChannelGroup, count: int) -> Tensor:
        return torch.randperm(group.size, generator=generator)[:count].sort().values

    yield {group.name: draw(group, 1) for group in groups}
    yield {group.name: draw(group, max(1, group.size - 1)) for group in groups}
    for some in (False, False, True, True):
        plan = {}
        for group in groups:
            count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
            if not some or float(torch.rand(1, generator=generator)) < 0.4:
                plan[group.name] = draw(group, count)
        yield plan


def relative(expected: list[Tensor], actual: list[Tensor], what: str) -> float:
    """Greatest difference over the greatest value, of any of the tensors.

    A thousandth of the greatest of them all (or of 1) is the least that is divided by: after some norms a gradient that
    should be zero is rounding.
    """
    if [x.shape for x in expected] != [x.shape for x in actual]:
        raise WrongCutError(
            f"{what}: shapes {[tuple(x.shape) for x in expected]} and {[tuple(x.shape) for x in actual]}"
        )
    worst = 0.0
    floor = 1e-3 * max([1.0, *(float(x.abs().max()) for x in expected)])
    for a, b in zip(expected, actual, strict=True):
        error = float((a - b).abs().max() / a.abs().max().clamp_min(floor))
        # not a number is an error too
        worst = error if not error <= worst else worst
    return worst


def set_mode(model: nn.Module, training: bool) -> None:
    """Train or eval mode, without dropout."""
    model.train(training)
    model.dropping = False
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


Plan = dict[str, Tensor]


def compare(model: nn.Module, groups: tc.Groups, plan: Plan, x: Tensor, training: bool, learns: bool = True) -> float:
    """Greatest difference of the masked and the cut model: outputs and, in train mode, statistics and gradients.

    Args:
        model: fp64.
        groups: of the model.
        plan: what to keep.
        x: the input.
        training: the mode; dropout is off.
        learns: compare gradients too.
    """
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    set_mode(masked, training)
    set_mode(small, training)
    tc.cut(small, copy.deepcopy(groups), plan, verify=False)
    with torch.set_grad_enabled(training), tc.masked(masked, groups, plan):
        expected = outputs(masked(x))
    with torch.set_grad_enabled(training):
        actual = outputs(small(x))
    error = relative([y.detach() for y in expected], [y.detach() for y in actual], "outputs")
    if training and learns:
        for given in (expected, actual):
            torch.stack([y.square().sum() for y in given]).sum().backward()
        # the cut takes statistics and gradients of the masked model with it
        tc.cut(masked, copy.deepcopy(groups), plan, verify=False)
        error = max(error, relative(*(_buffers(net) for net in (masked, small)), "buffers"))
        # a norm of channels that are constant divides the rounding of their gradients by the root of its epsilon
        error = max(error, 1e-3 * relative(*(_gradients(net) for net in (masked, small)), "gradients"))
    return error


def _buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def train_one_step(model: nn.Module, groups: tc.Groups, plan: Plan, x: Tensor) -> None:
    """The cut network learns: gradients of the new shapes for all that had one, and a second forward pass."""
    small, new = copy.deepcopy(model), copy.deepcopy(groups)
    shapes = {name: list(p.shape) for name, p in small.named_parameters()}
    for group in groups:
        lost = group.size - plan[group.name].numel() if group.name in plan else 0
        for member in group.members:
            if member.tensor in shapes:
                shapes[member.tensor][member.dim] -= lost * member.width
    wants = {name: p.requires_grad for name, p in small.named_parameters()}
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    small.train()
    graded = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([y.square().mean() for y in outputs(small(x))]).sum().backward()
        graded.append({name for name, p in small.named_parameters() if p.grad is not None})
        optimizer.step()
        if len(graded) == 1:
            tc.cut(small, new, plan, optimizer=optimizer, verify=False)
    found = {name: list(p.shape) for name, p in small.named_parameters()}
    if found != shapes:
        raise WrongCutError(
            f"shapes {[(name, found[name], shapes[name]) for name in found if found[name] != shapes[name]]}"
        )
    if graded[0] != graded[1]:
        raise WrongCutError(f"gradients appear or vanish: {graded[0] ^ graded[1]}")
    if wants != {name: p.requires_grad for name, p in small.named_parameters()}:
        raise WrongCutError("requires_grad changed")


def measure(model: nn.Module, groups: tc.Groups) -> Outcome:
    """How much of the network is offered, and what is not, by reason."""
    parameters = dict(model.named_parameters())
    inside = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    outcome = Outcome(params=sum(p.numel() for p in parameters.values()))
    for group in groups:
        outcome.channels += group.role("write")[0].index.numel()
        for member in group.members:
            if member.tensor in inside:
                inside[member.tensor].index_fill_(member.dim, member.index.flatten(), True)
    outcome.offered = sum(int(mask.sum()) for mask in inside.values())
    for entry in groups.frozen:
        outcome.frozen[entry.reason] += entry.size
    return outcome


def check(program: Program, seed: int = 0) -> Outcome | None:
    """Trace one network and try what is offered.

    Returns:
        None where there is nothing to prune.

    Raises:
        WrongCutError: an offered group doesn't hold.
        Exception: whatever else is raised is a crash.
    """
    torch.manual_seed(seed)
    model = program.build()
    try:
        # in fp32, as it is used: the proof has to tell a wrong group from rounding
        groups = tc.trace(model, program.input(2, seed).float())
    except tc.InputError as error:
        if "nothing to prune" not in str(error):
            raise
        return None
    outcome = measure(model, groups)
    randomise(model.double(), seed)
    # another batch than the traced one: a number that was its size must not matter
    x = program.input(3, seed + 1)
    # what a checkpoint does again in the backward pass isn't masked
    learns = "checkpoint(" not in program.source()
    for at, plan in enumerate(random_keeps(groups, seed)):
        for training in (False, True):
            error = compare(model, groups, plan, x, training, learns)
            if not error <= TOLERANCE:
                text = ", ".join(f"{name}: {kept.tolist()}" for name, kept in plan.items())
                raise WrongCutError(f"{error:.2g} in {'train' if training else 'eval'} mode, keeping {text}")
        if at in (0, 2):
            train_one_step(model, groups, plan, x)
    return outcome


def run(first: int, count: int) -> str:
    """Check the networks of ``count`` seeds; a table, and the source of whatever failed."""
    lines, total, nothing, faults = [], Outcome(), 0, Counter[str]()
    for seed in range(first, first + count):
        program = draw_program(Random(seed))
        try:
            outcome = check(program, seed)
        except Exception as error:
            kind = "wrong" if isinstance(error, WrongCutError) else "crashed"
            faults[kind] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            lines += [f"--- seed {seed} {kind}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"]
            lines += [program.source()]
            continue
        if outcome is None:
            nothing += 1
            continue
        total.params += outcome.params
        total.offered += outcome.offered
        total.channels += outcome.channels
        total.frozen += outcome.frozen
    lines.append(f"networks {count}, wrong {faults['wrong']}, crashed {faults['crashed']}, nothing to prune {nothing}")
    lines.append(f"share of parameters in offered groups {total.offered / max(1, total.params):.3f}")
    written = total.channels + total.frozen.total()
    lines.append(f"share of written channels offered {total.channels / max(1, written):.3f}; frozen, by reason:")
    shares: Counter[str] = Counter()
    for reason, size in total.frozen.items():
        shares[reason.split(" (")[0]] += size
    lines += [f"  {size / max(1, written):.4f} {reason}" for reason, size in shares.most_common(40)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] or [100]
    sys.stdout.write(run(numbers[1] if len(numbers) > 1 else 0, numbers[0]))
