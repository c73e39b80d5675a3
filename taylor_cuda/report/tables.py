"""The tables and lines a pruning run ends with."""

from __future__ import annotations

from taylor_cuda.text import table
from taylor_cuda.train.summary import Summary


def run_table(summary: Summary) -> str:
    """Widths per layer and totals, before and after."""
    rows = [(name, before, after, _share(after, before)) for name, (before, after) in summary.widths.items()]
    widths = table(("outputs of layer", "before", "after", "after / before"), rows)
    totals = table(("", "before", "after", "after / before"), _totals(summary))
    return f"{widths}\n\n{totals}"


def _totals(summary: Summary) -> list[tuple[str, str, str, str]]:
    s = summary
    return [
        (
            "channels that can go",
            f"{s.channels_before:,}",
            f"{s.channels_after:,}",
            _share(s.channels_after, s.channels_before),
        ),
        ("MACs per example", f"{s.macs_before:,}", f"{s.macs_after:,}", _share(s.macs_after, s.macs_before)),
        ("parameters", f"{s.params_before:,}", f"{s.params_after:,}", _share(s.params_after, s.params_before)),
        (
            "accuracy",
            f"{s.base_accuracy:.4f}",
            f"{s.pruned_accuracy:.4f}",
            f"{s.pruned_accuracy - s.base_accuracy:+.4f}",
        ),
        _latency("latency, batch 1", s.latency_ms_batch1_before, s.latency_ms_batch1_after),
        _latency("latency, batch 256", s.latency_ms_before, s.latency_ms_after),
    ]


def _share(after: float, before: float) -> str:
    return f"{after / before:.3f}" if before else "-"


def _latency(name: str, before: float | None, after: float | None) -> tuple[str, str, str, str]:
    if before is None or after is None:
        return (name, "out of memory", "out of memory", "-")
    return (name, f"{before:.3f} ms", f"{after:.3f} ms", _share(after, before))


def measured_lines(summary: Summary) -> list[str]:
    """What the run checked about itself, a line each."""
    s = summary
    if s.source_difference is None:
        sources = f"not compared: {s.source_note or 'the run had no whole first window'}"
    else:
        sources = f"greatest relative difference {s.source_difference:.2g}"
    lines = [
        f"cut == masked: greatest difference {s.cut_difference:.2g} (outputs up to {s.cut_scale:.3g}, {s.cuts} cuts)",
        f"scores from parameters vs from activations: {sources}",
        f"scoring cost: {s.scoring_percent:.1f} % of a step ({s.step_ms:.1f} ms)",
        f"training step after pruning, mode {s.config['mode']}: {s.pruned_step_ms:.1f} ms",
        f"estimate vs oracle: {_oracle(s)}",
    ]
    if s.unreadable:
        were = "file could not be read and was" if s.unreadable == 1 else "files could not be read and were"
        lines.insert(0, f"{s.unreadable} image {were} left out; log.jsonl names what was wrong")
    return lines


def _oracle(s: Summary) -> str:
    if s.estimate_spearman is None:
        return f"not compared: {s.oracle_note or '--oracle N compares them on N minibatches'}"
    magnitude = "-" if s.magnitude_spearman is None else f"{s.magnitude_spearman:.2f}"
    return f"Spearman {s.estimate_spearman:.2f} (magnitude {magnitude}), {s.oracle_examples:,} training images"
