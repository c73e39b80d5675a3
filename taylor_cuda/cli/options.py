"""Options that several commands take, as text from the shell."""

from __future__ import annotations

from taylor_cuda.errors import InputError

__all__ = ["parse_round_to"]


def parse_round_to(text: str) -> int | str:
    """``--round-to``: a whole number, or ``"auto"``.

    Raises:
        InputError: neither of the two.
    """
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"round_to: wanted 'auto' or a whole number, got {text!r}") from None
