"""The facts of :mod:`taylor_cuda.report.examine` as text that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from taylor_cuda.graph.groups import layer_of
from taylor_cuda.text import table

__all__ = ["doctor_text"]

_ROLES = (("writers", "written by"), ("norms", "normalised by"), ("readers", "read by"), ("others", "also in"))
_SHORT_UNITS = {"channel": "", "convolution group": "conv group"}


def doctor_text(found: dict[str, Any], columns: int = 100, full: bool = False) -> str:
    """Headline, groups, what stays, traps, notes, best case.

    Args:
        found: from ``examine``, with ``model`` (its name), ``input`` (the shape of one example) and ``seconds``.
        columns: width of the terminal; at least 72 are used.
        full: wrap what doesn't fit in a line and name everything, instead of cutting it off at the end.
    """
    lay = _Layout(max(columns, 72), full)
    parts = [_headline(found, lay), _groups(found["groups"], lay)]
    if found["frozen"]:
        parts.append(_frozen(found["frozen"], lay))
    traps = _traps(found["traps"], found["groups"])
    parts.extend("\n".join(lay.item(text, most=3)) for text in [*traps, *(f"note: {note}" for note in found["notes"])])
    parts.append(_best_case(found, lay))
    return "\n\n".join(parts)


class _Layout:
    """How wide lines are, and what becomes of those that are too long."""

    def __init__(self, columns: int, full: bool) -> None:
        self.columns, self.full = columns, full

    def fit(self, text: str, columns: int, most: int = 1) -> list[str]:
        """``text`` in lines of ``columns``: all of it where everything is shown, else ``most`` lines."""
        lines = textwrap.wrap(text, max(columns, 20), break_on_hyphens=False) or [""]
        if self.full or len(lines) <= most:
            return lines
        rest = " ".join(lines[most - 1 :])
        return [*lines[: most - 1], rest[: max(columns - 1, 19)] + "…"]

    def placed(self, text: str, place: str, columns: int) -> list[str]:
        """``text (place)``; what doesn't fit in a line is cut off from the text, where there is room for both."""
        after = f" ({place})" if place else ""
        if self.full or len(after) > columns // 2:
            return self.fit(text + after, columns)
        return [self.fit(text, columns - len(after))[0] + after]

    def item(self, text: str, indent: int = 2, most: int = 1) -> list[str]:
        """``text`` with everything but its first line indented."""
        first, *rest = self.fit(text, self.columns - indent, most)
        return [first, *(" " * indent + line for line in rest)]

    def names(self, said: str, names: Sequence[str], indent: int) -> list[str]:
        """One line that lists as many names as it holds, or all of them in several."""
        room = self.columns - indent
        names = [self.name(name, room - len(said) - len("  and 1000 more")) for name in names]
        text = f"{said} {', '.join(names)}"
        shown = len(names)
        while not self.full and len(text) > room and shown > 1:
            shown -= 1
            text = f"{said} {', '.join(names[:shown])} and {len(names) - shown} more"
        return [" " * indent + line for line in self.fit(text, room)]

    def name(self, text: str, room: int) -> str:
        """``text`` in ``room`` columns, its middle left out where it is longer."""
        if self.full or len(text) <= room:
            return text
        return f"{text[: room // 3]}…{text[-(room - room // 3 - 1) :]}"


def _headline(found: dict[str, Any], lay: _Layout) -> str:
    cost = found["cost"]
    shape = "×".join(str(length) for length in found["input"])
    lines = [
        f"{found['model']}, input {shape}, traced in {found['seconds']:.1f} s",
        f"{cost['macs']:,} MACs, {cost['params']:,} parameters, {cost['channels']:,} units in "
        f"{len(found['groups'])} groups can go",
    ]
    return "\n".join(part for line in lines for part in lay.item(line))


def _groups(groups: Sequence[dict[str, Any]], lay: _Layout) -> str:
    rows = [
        (
            f"{group['size']:,}",
            _unit(group),
            f"{_short(group['macs'])} {group['macs_share']:6.1%}",
            f"{_short(group['params'])} {group['params_share']:6.1%}",
        )
        for group in groups
    ]
    header = ("units", "of", "MACs", "parameters")
    used = sum(2 + max(map(len, column)) for column in zip(header, *rows, strict=True))
    named = [(lay.name(group["name"], lay.columns - used), *row) for group, row in zip(groups, rows, strict=True)]
    head, rule, *lines = table(("group", *header), named).splitlines()
    result = [head, rule]
    for line, group in zip(lines, groups, strict=True):
        result.append(line)
        for key, said in _ROLES:
            if group[key]:
                result.extend(lay.names(said, group[key], indent=4))
    return "\n".join(result)


def _unit(group: dict[str, Any]) -> str:
    kind = _SHORT_UNITS.get(group["unit"], group["unit"])
    return f"{kind} ×{group['width']}" if kind else "1"


def _short(number: int) -> str:
    """Three digits and a letter: 12_345_678 as ``12.3 M``."""
    value, letters = float(number), iter(("", " k", " M", " G", " T"))
    letter = next(letters)
    while value >= 999.5 and letter != " T":
        value, letter = value / 1000, next(letters)
    return f"{value:.0f}{letter}" if value >= 99.5 or not letter else f"{value:.3g}{letter}"


def _frozen(frozen: Sequence[dict[str, Any]], lay: _Layout) -> str:
    rows = [(lay.name(entry["name"], lay.columns // 3), f"{entry['size']:,}") for entry in frozen]
    lines = table(("stays", "channels"), rows).splitlines()
    used = len(lines[1]) + 2
    result = [f"{lines[0]}  why", f"{lines[1]}  ---"]
    for line, entry in zip(lines[2:], frozen, strict=True):
        place = ", ".join(part for part in (entry["module"], entry["line"]) if part)
        first, *rest = lay.placed(entry["reason"], place, lay.columns - used)
        result += [f"{line}  {first}", *(" " * used + part for part in rest)]
    return "\n".join(result)


def _traps(traps: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[str]:
    """One text for each kind of trap there is."""
    said = []
    if traps["frozen_parameters"]:
        names = ", ".join(entry["parameter"] for entry in traps["frozen_parameters"])
        said.append(
            f"trap: {len(traps['frozen_parameters'])} parameters of these groups are not trained (requires_grad is "
            f"off); they are cut like the others, but have no gradient to score with: {names}"
        )
    tied = [" = ".join(entry["names"]) for entry in traps["shared"] if len(entry["names"]) > 1]
    if tied:
        said.append(f"trap: one parameter under several names, cut once for all of them: {'; '.join(tied)}")
    often = {layer_of(entry["parameter"]): entry["calls"] for entry in traps["shared"] if entry["calls"] > 1}
    if often:
        names = ", ".join(f"{name} ({calls} times)" for name, calls in often.items())
        said.append(f"trap: used more than once in one forward pass: {names}")
    odd: dict[tuple[str, int], list[str]] = {}
    for group in groups:
        if group["name"] in traps["odd_groups"]:
            odd.setdefault((group["unit"], group["width"]), []).append(group["name"])
    said += [
        f"trap: a unit is not one channel but {width} at once ({unit}): {', '.join(names)}"
        for (unit, width), names in odd.items()
    ]
    said += _left(traps["unused"], "no forward pass meets these parameters, and they stay as they are")
    said += _left(traps["train_only"], "only the forward pass in train mode meets")
    follow = [
        f"{number['module']}.{number['name']}".lstrip(".") + f" = {number['value']} ({number['per_unit']} a unit)"
        for group in groups
        for number in group["numbers"]
    ]
    if follow:
        said.append(f"attributes that a cut changes with the groups: {', '.join(follow)}")
    return said


def _left(entries: Iterable[dict[str, Any]], what: str) -> list[str]:
    names = ", ".join(f"{entry['module']} ({entry['params']:,} parameters)" for entry in entries)
    return [f"trap: {what}: {names}"] if names else []


def _best_case(found: dict[str, Any], lay: _Layout) -> str:
    cost, best = found["cost"], found["best_case"]
    floors = f"min_keep={best['min_keep']}, max_ratio={best['max_ratio']:g}, round_to={best['round_to']}"
    rows = [
        (said, f"{best[name]:,}", f"{cost[name]:,}", f"{name}={best['budget'][name]:g}")
        for name, said in (("macs", "MACs"), ("params", "parameters"), ("channels", "units"))
        if name in best["budget"]
    ]
    title = lay.item(f"best case, every group at its floor ({floors}):")
    return "\n".join([*title, table(("", "least", "now", "lowest budget"), rows)])
