"""Two moments of what ``make faults`` does at twenty."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from tests.faults.moments import EVERY, Moment, go_through, reference_run
from tests.faults.runs import bit_equal, differences

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc"),
]

ARGUMENTS = (
    *("--epochs", "1", "--steps-limit", "6", "--batch", "8", "--every", "2", "--steps", "2", "--recalibrate", "1"),
    *("--checkpoint-every", str(EVERY), "--measure-seconds", "0.01", "--oracle", "0", "--resume", "auto"),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return reference_run(ARGUMENTS, tmp_path_factory.mktemp("reference") / "out")


@pytest.mark.parametrize(
    "moment",
    [Moment(0.1, writing=True, cut=0.5), Moment(0.1, rank=1, writing=True)],
    ids=["all of it, the last checkpoint cut", "one rank"],
)
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, reference, moment):
    found = go_through(ARGUMENTS, tmp_path / "out", moment, reference)
    assert differences(found, reference.result) == []
    assert bit_equal(found, reference.result)
