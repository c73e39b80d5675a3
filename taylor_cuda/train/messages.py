"""Other people's exceptions in one line of ours."""

from __future__ import annotations

import traceback


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def first_line_and_place(error: BaseException) -> str:
    """Type and first line of an exception, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = f": {first_line(error)}" if str(error).strip() else ""
    return f"{type(error).__name__}{text}{place}"
