"""``python -m tests.faults [--moments 20] [--seed 0] [--ranks 2]``: a line a moment; 1 if any of them went wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.moments import EVERY, moments_of, one_moment, reference_run
from tests.faults.runs import bit_equal

ARGUMENTS = (
    *("--epochs", "1", "--steps-limit", "16", "--batch", "16", "--every", "3", "--steps", "4", "--recalibrate", "4"),
    *("--checkpoint-every", str(EVERY), "--measure-seconds", "0.01", "--oracle", "0", "--resume", "auto"),
)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20, metavar="N", help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="of each run (default: 2)")
    options = parser.parse_args(given)
    started, went_on, same_bits = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference = reference_run(ARGUMENTS, folder / "reference", options.ranks)
        told = f"{len(reference.result.plans)} plans, accuracy {reference.result.accuracy:.4f}"
        pace = f"{reference.minibatches} minibatches of {reference.each:.2f} s"
        print(f"undisturbed: {told}; {pace} after {reference.begins:.1f} s", flush=True)
        for number, moment in enumerate(moments_of(options.moments, options.ranks, options.seed), 1):
            found, wrong = one_moment(ARGUMENTS, folder, number, moment, reference, options.ranks)
            same = found is not None and bit_equal(found, reference.result)
            went_on, same_bits = went_on + (not wrong), same_bits + same
            told = "" if found is None else f"accuracy {found.accuracy:.4f}, {'same' if same else 'other'} bits"
            seen = "; ".join(moment.seen)
            print(f"{number:2}  {moment.when:+.2f}  {moment.how:17}  {wrong or 'ok'}  {told}  {seen}", flush=True)
    told = f"{went_on} of {options.moments} ended in the same plans and accuracy, {same_bits} in the same bits"
    print(f"{told}; {time.monotonic() - started:.0f} s")
    return 0 if went_on == options.moments else 1


if __name__ == "__main__":
    sys.exit(main())
