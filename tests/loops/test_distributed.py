"""Two ranks with data of their own stay one model across cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as Wrapper
from torch.optim import SGD

import taylor_cuda as tc
from taylor_cuda.distributed import Replicas
from taylor_cuda.importance.criteria import CRITERIA
from tests.loops.loop import EXAMPLE, WIDTHS, DictAverage, Net, batches
from tests.loops.replicated import Run
from tests.ranks import check_passed, on_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

OPTIONS = {"budget": {"macs": 0.45, "channels": 0.6}, "max_ratio": 0.5}


def everywhere(value: Tensor) -> list[Tensor]:
    """The value of every rank."""
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return found


def check_same(model: torch.nn.Module, what: str) -> None:
    """Shapes and values, bit for bit, in one exchange."""
    shapes, values = [torch.tensor(p.shape) for p in model.parameters()], [p.detach() for p in model.parameters()]
    for pieces in (shapes, values):
        mine, other = everywhere(torch.cat([piece.flatten() for piece in pieces]))
        assert torch.equal(mine, other), what


def halves(rank: int, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(x[4 * rank : 4 * rank + 4], target[4 * rank : 4 * rank + 4]) for x, target in batches(count, seed)]


def stays_one_model(rank: int, **options: Any) -> None:
    """Two cuts, then 50 steps; accumulation with and without ``no_sync`` on the way."""
    torch.manual_seed(rank)  # the wrapper makes them equal
    model = Net()
    wrapper = Wrapper(model, gradient_as_bucket_view=True, bucket_cap_mb=1)
    calls: list[int] = []
    wrapper.register_comm_hook(calls, counted_average)
    wrapper.register_forward_hook(lambda _module, _args, _kwargs, _outputs: calls.append(0), with_kwargs=True)
    optimizer, average = SGD(model.parameters(), lr=0.05, momentum=0.9), DictAverage(model)
    pruner = tc.Pruner(wrapper, EXAMPLE, optimizer, every=4, steps=2, ema=average.values, **OPTIONS, **options)
    assert pruner.model is model
    cut_at = []
    for i, (x, target) in enumerate(batches(58, seed=rank)):
        with wrapper.no_sync():
            pruner.backward(F.cross_entropy(wrapper(x[:4]), target[:4]) / 2, accumulate=True)
        before = len([call for call in calls if call])
        pruner.backward(F.cross_entropy(wrapper(x[4:]), target[4:]) / 2)
        assert len([call for call in calls if call]) > before, f"step {i}: no gradient was averaged"
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        if pruner.step() is not None:
            cut_at.append(i)
        check_same(model, f"step {i}")
    assert cut_at == [3, 7]
    pruner.finish()
    check_same(model, "the end")
    assert sum(model.widths()) <= 18
    assert calls.count(0) == 2 * 58
    assert wrapper.gradient_as_bucket_view
    assert wrapper.bucket_bytes_cap == 2**20
    assert wrapper.training
    assert model.stem.weight.grad is None
    mine, other = everywhere(average.values["stem.weight"])
    assert torch.equal(mine, other)


def counted_average(calls, bucket):
    """A communication hook; it has to outlive every cut. Torch refuses annotations that are strings."""
    calls.append(1)
    reduced = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


def scores_are_those_of_the_whole_batch(rank: int) -> None:
    """In eval mode the mean over ranks of the gradients is the gradient over the batch of both."""
    for criterion, source in (
        ("taylor_fo", "parameters"),
        ("taylor_fo", "activations"),
        ("taylor_fg", "auto"),
        ("taylor_output", "auto"),
        ("taylor_weight", "auto"),
        ("taylor_so", "auto"),
        ("taylor_so_hessian", "auto"),
        ("taylor_fo_fisher", "auto"),
    ):
        torch.manual_seed(0)
        model, whole = Net().eval(), Net().eval()
        whole.load_state_dict(model.state_dict())
        options = {"criterion": criterion, "source": source, "every": 100}
        pruner, alone = tc.Pruner(Wrapper(model), EXAMPLE, **options), tc.Pruner(whole, EXAMPLE, **options)
        for (x, target), (x_all, target_all) in zip(halves(rank, 2), batches(2), strict=True):
            outputs, all_outputs = pruner._replicas.wrapper(x), whole(x_all)
            pruner.backward(F.cross_entropy(outputs, target), outputs)
            alone.backward(F.cross_entropy(all_outputs, target_all), all_outputs)
            model.zero_grad()
            whole.zero_grad()
        for name, score in pruner.importance.scores().items():
            expected = alone.importance.scores()[name]
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
            mine, other = everywhere(score)
            assert torch.equal(mine, other), (criterion, source, name)


def one_flat_sum_a_step(rank: int) -> None:
    """Whatever a criterion adds to the gradients' own average, it is one exchange, in fp32."""
    for name, criterion in CRITERIA.items():
        for source in ("parameters", "activations") if name == "taylor_fo" else ("auto",):
            model = Net()
            wrapper = Wrapper(model)
            pruner = tc.Pruner(wrapper, EXAMPLE, criterion=name, source=source, ignore="conv3")
            x, target = batches(1)[0]
            outputs = wrapper(x)
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as exchange:
                pruner.backward(F.cross_entropy(outputs, target), outputs)
            sent = [call.args[0] for call in exchange.call_args_list]
            count = sum(pruner.groups.sizes().values())
            lengths = {"taylor_fg": count, "taylor_output": count, **dict.fromkeys(SECOND_ORDER, 2 * count)}
            if source == "activations":
                # the readers' inputs: the stream is read by two layers
                lengths[name] = count + WIDTHS[0]
            assert [len(each) for each in sent] == ([lengths[name]] if name in lengths else []), name
            assert all(each.dtype == torch.float32 for each in sent)
            assert criterion.gradient or not sent


def uneven_parts_count_as_their_loss_does(rank: int) -> None:
    """The mean over ranks of mean losses weighs an example by the size of its rank's part, and so do the scores."""
    x, target = batches(1)[0]
    parts = [(x[:3], target[:3]), (x[3:], target[3:])]
    for criterion in ("taylor_fo", "taylor_fg", "taylor_so"):
        torch.manual_seed(0)
        model = Net().double().eval()
        whole = copy.deepcopy(model)
        options = {"criterion": criterion, "source": "activations", "every": 100}
        wrapper, example = Wrapper(model), EXAMPLE.double()
        pruner, alone = tc.Pruner(wrapper, example, **options), tc.Pruner(whole, example, **options)
        outputs, all_outputs = wrapper(parts[rank][0].double()), whole(x.double())
        pruner.backward(F.cross_entropy(outputs, parts[rank][1]), outputs)
        losses = [F.cross_entropy(all_outputs[:3], parts[0][1]), F.cross_entropy(all_outputs[3:], parts[1][1])]
        alone.backward(sum(losses) / 2, all_outputs)
        for name, score in pruner.importance.scores().items():
            torch.testing.assert_close(score, alone.importance.scores()[name], rtol=1e-6, atol=0)


def compiled_in_place(rank: int) -> None:
    """The module inside the wrapper, compiled for the widths of the moment: as if it weren't."""
    run = Run(Net)
    compiled = replace(run, prepare=lambda net: (net.compile(backend="eager"), net)[1])
    compiled.go(dist.group.WORLD).check(run.go())


def compiled_otherwise_is_refused(rank: int) -> None:
    model = Net()
    with pytest.raises(tc.InputError, match=r"around what torch.compile returned; compile the module in place"):
        tc.Pruner(Wrapper(torch.compile(model, backend="eager")), EXAMPLE)
    with pytest.raises(tc.InputError, match=r"compiled by torch.compile; give the wrapper itself, model\._orig_mod"):
        tc.Pruner(torch.compile(Wrapper(model), backend="eager"), EXAMPLE)
    assert not model._forward_pre_hooks


def ranks_that_would_cut_differently_raise(rank: int) -> None:
    model = Net()
    wrapper = Wrapper(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    pruner = tc.Pruner(wrapper, EXAMPLE, optimizer, every=1, criterion="random", seed=rank, **OPTIONS)
    with pytest.raises(tc.TaylorError, match=r"the plan differs over ranks \(rank 0: \w+; rank 1: \w+\)"):
        pruner.step()
    assert model.widths() == Net().widths()


def a_failure_on_one_rank_reaches_the_other(rank: int) -> None:
    model = Net()
    pruner = tc.Pruner(Wrapper(model), EXAMPLE, SGD(model.parameters(), lr=0.05), every=1, **OPTIONS)
    pruner.backward(F.cross_entropy(pruner._replicas.wrapper(batches(1)[0][0]), batches(1)[0][1]))
    if rank == 1:
        model.register_buffer("late", model.conv1.weight.detach())  # shares memory: this cut is refused
    message = "share memory" if rank == 1 else "the cut failed on rank 1: InputError: model: .*share memory"
    with pytest.raises(tc.TaylorError, match=message):
        pruner.step()


def other_wrappers_are_refused(rank: int) -> None:
    x, target = batches(1)[0]
    model = Net()
    wrapper = Wrapper(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    unwrapped = tc.Pruner(model, EXAMPLE, optimizer, every=1, steps=1, **OPTIONS)
    with pytest.raises(tc.InputError, match="give Pruner the wrapper itself"):
        wrapper(x)
    unwrapped._wrapper_check.remove()
    pruner = tc.Pruner(wrapper, EXAMPLE, optimizer, every=2, steps=1, **OPTIONS)
    stale = Wrapper(model)
    with pytest.raises(tc.InputError, match="call the wrapper that Pruner was given"):
        stale(x)
    with torch.no_grad():
        stale(x)  # nothing to average
    for _ in range(2):
        pruner.backward(F.cross_entropy(wrapper(x), target))
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.done
    assert not model._forward_pre_hooks


def resumes(rank: int) -> None:
    """Two ranks resume from what each of them saved, and stay one model that equals an uninterrupted one."""

    def start() -> tuple[Net, Wrapper, SGD, tc.Pruner]:
        torch.manual_seed(0)
        model = Net()
        wrapper, optimizer = Wrapper(model), SGD(model.parameters(), lr=0.05, momentum=0.9)
        options = {"source": "activations", "every": 4, "steps": 2, **OPTIONS}
        return model, wrapper, optimizer, tc.Pruner(wrapper, EXAMPLE, optimizer, **options)

    def run(wrapper: Wrapper, optimizer: SGD, pruner: tc.Pruner, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, target in data:
            pruner.backward(F.cross_entropy(wrapper(x), target))
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()

    data = halves(rank, 12)
    model, *rest = start()
    run(*rest, data)
    first, *rest = start()
    run(*rest, data[:6])
    saved = first.state_dict(), rest[1].state_dict(), rest[2].state_dict()
    again, *rest = start()
    rest[2].load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    rest[1].load_state_dict(saved[1])
    run(*rest, data[6:])
    check_same(again, "resumed")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


SECOND_ORDER = {name for name, criterion in CRITERIA.items() if criterion.curvature}

CASES: dict[str, Callable[[int], None]] = {
    "parameters": stays_one_model,
    "activations": lambda rank: stays_one_model(rank, source="activations"),
    "compact": lambda rank: stays_one_model(rank, mode="compact"),
    "compact, activations": lambda rank: stays_one_model(rank, mode="compact", source="activations"),
    "mask": lambda rank: stays_one_model(rank, mode="mask"),
    "scores": scores_are_those_of_the_whole_batch,
    "sums": one_flat_sum_a_step,
    "uneven": uneven_parts_count_as_their_loss_does,
    "compiled": compiled_in_place,
    "compiled otherwise": compiled_otherwise_is_refused,
    "plans": ranks_that_would_cut_differently_raise,
    "failure": a_failure_on_one_rank_reaches_the_other,
    "wrappers": other_wrappers_are_refused,
    "resume": resumes,
}


def cases(rank: int, _folder: Path) -> dict[str, Callable[[], None]]:
    return {name: partial(case, rank) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(cases, folder, seconds=240)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, rank: int, outcomes: Path) -> None:
    check_passed(case, rank, outcomes)


def test_one_process_needs_no_group() -> None:
    replicas = Replicas(Net())
    assert (replicas.size, replicas.wrapper, replicas.group) == (1, None, None)
    replicas.agree("the plan", "abc")
    replicas.rewrap()
    with pytest.raises(ZeroDivisionError), replicas.together("the cut"):
        raise ZeroDivisionError
    assert replicas.watch_wrapper() is None
