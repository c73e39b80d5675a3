"""``summary.json``: everything a run found out, for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from taylor_cuda.files import replacing
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.summary import Summary


def summary_dict(summary: Summary) -> dict[str, Any]:
    """Plain values; a number that isn't finite becomes ``None``, which JSON can hold."""
    return {key: _plain(value) for key, value in dataclasses.asdict(summary).items()}


def is_summary_of(path: Path, config: RunConfig) -> bool:
    """A run with these settings has ended and written its summary there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("config") == json.loads(json.dumps(_plain(config.identity())))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_summary(summary: Summary, path: Path) -> None:
    """Write it as JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(summary_dict(summary), indent=2) + "\n", encoding="utf-8")
