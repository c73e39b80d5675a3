"""A compiled model goes on across cuts: compiled anew where widths change and only there, and scored as ever."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import taylor_cuda as tc
from tests.loops.loop import EXAMPLE, Loop, Net, Parts, batches


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1
        return graph.forward


def trained(called: Callable[[Loop], Any], steps: int = 4, **options: Any) -> tuple[Loop, list[list[int]]]:
    """Train, and cut every second step. ``called`` makes what is called in place of the model."""
    torch.manual_seed(3)
    loop = Loop(Parts(), Net())
    if options.pop("after", True):
        pruner = loop.pruner(every=2, steps=steps, **options)
        loop.called = called(loop)
    else:
        loop.called = called(loop)
        loop.called(EXAMPLE)  # compiled before anything was put into the model
        pruner = loop.pruner(every=2, steps=steps, **options)
    widths = []
    for batch in batches(2 * steps + 2):
        loop.step(batch, pruner)
        pruner.step()
        widths.append(loop.model.widths())
    assert pruner.done
    return loop, widths


def same(loop: Loop, expected: Loop) -> bool:
    results = expected.results()
    return all(torch.equal(value, results[name]) for name, value in loop.results().items() if "num_batches" not in name)


def test_it_is_compiled_anew_only_where_widths_change() -> None:
    backend = Counting()
    seen: list[int] = []

    def compiled(loop: Loop) -> Any:
        function = torch.compile(loop.model, backend=backend)

        def call(x: Tensor) -> Tensor:
            outputs = function(x)
            seen.append(backend.compiled)
            return outputs

        return call

    loop, widths = trained(compiled)
    changes = 1 + sum(a != b for a, b in itertools.pairwise(widths))
    assert backend.compiled == seen[-1] == changes > 3
    for (before, after), (a, b) in zip(itertools.pairwise(seen[1:]), itertools.pairwise(widths[:-1]), strict=True):
        assert (after > before) == (a != b)
    assert same(loop, trained(lambda loop: loop.model)[0])


def test_more_cuts_than_torch_keeps_versions_of_are_right_all_the_same() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        loop, widths = trained(lambda loop: torch.compile(loop.model, backend="eager"), schedule="linear")
    assert len({tuple(width) for width in widths}) > 3
    assert same(loop, trained(lambda loop: loop.model, schedule="linear")[0])


def whole(loop: Loop, backend: str) -> Any:
    return torch.compile(loop.model, backend=backend)


def in_place(loop: Loop, backend: str) -> Any:
    loop.model.compile(backend=backend)
    return loop.model


def inside(loop: Loop, backend: str) -> Any:
    """The model is only a part of what is compiled."""
    return torch.compile(lambda x: loop.model(x), backend=backend)


@pytest.mark.parametrize(
    ("how", "backend", "criterion", "after"),
    [
        (whole, "eager", "taylor_fo", False),
        (in_place, "eager", "taylor_fg", True),
        (inside, "eager", "taylor_fo", False),
        (whole, "aot_eager", "taylor_fg", True),
        (whole, "aot_eager", "taylor_fo", False),
        (inside, "aot_eager", "taylor_fo", False),
    ],
)
def test_scores_from_activations_are_never_silently_missing(how: Any, backend: str, criterion: str, after: bool):
    """They are those of the model uncompiled, or the step raises. ``after``: the pruner was there first."""
    options = {"criterion": criterion, "source": "activations"}
    expected, _ = trained(lambda loop: loop.model, 2, after=after, **options)
    try:
        loop, _ = trained(lambda loop: how(loop, backend), 2, after=after, **options)
    except tc.InputError:
        assert how is inside
        assert not after, "nothing was compiled before the gates were there"
        return
    assert same(loop, expected)


def test_watch_scores_a_compiled_loop() -> None:
    def watched(called: Callable[[Loop], Any]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        loop = Loop(Parts(), Net())
        loop.called = called(loop)
        loop.step(batches(1)[0])
        with tc.watch(loop.model, EXAMPLE, source="activations") as scores:
            for batch in batches(2):
                loop.step(batch)
        assert scores.steps == 2
        return scores.scores()

    expected = watched(lambda loop: loop.model)
    for name, value in watched(lambda loop: whole(loop, "eager")).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=0)  # gates sum in another order than ReLUs


def test_masked_reaches_a_compiled_model() -> None:
    loop = Loop(Parts(), Net().eval())
    groups, x = tc.trace(loop.model, EXAMPLE), batches(1)[0][0]
    called = in_place(loop, "eager")
    plain = called(x)
    keep = {group.name: torch.arange(0, group.size, 2) for group in groups}
    with tc.masked(loop.model, groups, keep):
        off = called(x)
    assert not torch.allclose(off, plain)
    assert torch.equal(called(x), plain)
    tc.cut(loop.model, groups, keep)
    torch.testing.assert_close(called(x), off)
    assert F.mse_loss(called(x), plain) > 0
