"""A summary to write reports of."""

import dataclasses

from taylor_cuda.train.summary import Summary


def some_summary(**changes):
    summary = Summary(
        model="digits", data="digits", criterion="taylor_fo", budget={"macs": 0.5}, seed=3,
        base_accuracy=0.99, cut_accuracy=0.9, pruned_accuracy=0.985,
        macs_before=1000, macs_after=480, params_before=200, params_after=100, channels_before=64, channels_after=40,
        latency_ms_before=8.0, latency_ms_after=6.0, latency_ms_batch1_before=0.5, latency_ms_batch1_after=0.4,
        widths={"conv": (32, 20), "head": (10, 10)}, cut_difference=1.5e-6, cut_scale=9.0, cuts=4,
        source_difference=2e-7, source_note=None, estimate_spearman=0.954, magnitude_spearman=0.41, oracle_examples=192,
        oracle_note=None, scoring_percent=1.25, step_ms=20.0, pruned_step_ms=12.0, unreadable=0, seconds=12.0,
        config={"ignore": ["fc"], "mode": "cut"}, environment={"torch": "2"},
    )  # fmt: skip
    return dataclasses.replace(summary, **changes)
