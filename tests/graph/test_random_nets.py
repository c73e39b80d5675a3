"""Random networks: what is offered is exact, in eval and in train mode, in value and gradient, and learns."""

from __future__ import annotations

import functools
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import taylor_cuda as tc
from tests.graph import random_nets
from tests.graph.draw_lines import FLAT_IMAGES, HARD, HIDDEN, PLAIN, TOKENS, Line
from tests.graph.draw_nets import draw_program, program_of
from tests.graph.random_nets import WrongCutError, check

pytestmark = pytest.mark.filterwarnings("ignore:input.s size at dim=1 does not match num_features")


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    # without Phase.shrink, which makes the network that fails small, but takes five minutes
    phases=(Phase.generate,),
)
@given(st.randoms(use_true_random=False))
def test_what_is_offered_of_a_random_network_holds(random):
    program = draw_program(random)
    note(program.source())
    check(program)


@pytest.mark.parametrize("line", [*PLAIN, *HARD, *FLAT_IMAGES, *TOKENS], ids=lambda line: f"{line.layer} {line.code}")
def test_every_line_between_two_convolutions(line):
    program = program_of(line)
    # the last layer before the head can be pruned whatever the line does to the first
    assert check(program) is not None
    if line in PLAIN or line in TOKENS[:2]:
        groups = tc.trace(program.build(), program.input(2, 0).float())
        assert ("l0.weight", 0) in {(member.tensor, member.dim) for group in groups for member in group.members}


@pytest.mark.parametrize("line", HIDDEN, ids=lambda line: line.code)
def test_hidden_numbers_of_channels(line):
    check(program_of(line))


@pytest.mark.parametrize(
    "line",
    [
        Line("{x} / {x}.shape[1]"),
        Line("F.group_norm({x}, 2, {l}, {l})", layer="nn.Parameter(torch.ones({c}))"),
    ],
    ids=lambda line: line.code,
)
def test_a_wrong_group_is_seen(monkeypatch, line):
    monkeypatch.setattr(tc, "trace", functools.partial(tc.trace, prove=False))
    with pytest.raises((WrongCutError, RuntimeError)):
        check(program_of(line))


def test_a_wrong_network_is_counted_and_printed(monkeypatch):
    monkeypatch.setattr(tc, "trace", functools.partial(tc.trace, prove=False))
    monkeypatch.setattr(random_nets, "draw_program", lambda _: program_of(Line("{x} / {x}.shape[1]")))
    text = random_nets.run(5, 1)
    assert "--- seed 5 wrong: WrongCutError" in text
    assert "v1 = v0 / v0.shape[1]" in text
    assert "networks 1, wrong 1, crashed 0, nothing to prune 0" in text


def test_networks_are_the_same_in_every_process():
    first, second = (draw_program(Random(3)).source() for _ in range(2))
    assert first == second
    assert len({draw_program(Random(seed)).source() for seed in range(20)}) == 20
