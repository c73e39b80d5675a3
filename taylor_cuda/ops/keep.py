"""Keep lists: from masks, with one read from the device for all of them, and what ops on kept channels accept.

What a list holds decides which memory is read and written, and on a GPU nobody can look without waiting for it. So a
list is looked at once, when an op first meets it, and remembered by identity and version; those that ``keep_lists``
makes are known from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from taylor_cuda.errors import InputError
from taylor_cuda.ops import library

Channels = NDArray[np.int64]


class _Known(NamedTuple):
    version: int
    entries: Channels


_known = WeakTensorKeyDictionary()


def keep_lists(masks: Sequence[Tensor], round_to: int = 1) -> list[Tensor]:
    """Keep lists of many masks, for ops that compute the kept channels only: one read from the device for all of them.

    An op that is given a mask has to ask the device how many channels are kept, layer by layer; a list says so by its
    length. Call this once after a pruning step. In a list the kept channels ascend, and -1 fills it up to a multiple of
    ``round_to``: each is a channel of zeros. Tensor cores like 16 (8 at least) for 16-bit types on a GPU.

    Args:
        masks: bool ``[C_i]``, True where a channel is kept; all on one device.
        round_to: what the length of every list is a multiple of.

    Returns:
        One int64 list ``[K_i]`` a mask, on the masks' device; parts of one tensor, which may not be changed.

    Raises:
        InputError: a mask of another dtype, shape or device, or a ``round_to`` below 1.
    """
    if not isinstance(masks, (list, tuple)):
        raise InputError(f"masks: wanted a list of tensors, got {type(masks).__name__}")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise InputError(f"round_to: wanted an int of at least 1, got {round_to!r}")
    devices = [mask.device for mask in masks if isinstance(mask, Tensor)] or [torch.device("cpu")]
    for i, mask in enumerate(masks):
        _check_vector(mask, f"masks[{i}]", devices[0], (torch.bool,))
    if not masks:
        return []
    flags = torch.cat(list(masks)).cpu().numpy()
    ends = np.cumsum([mask.shape[0] for mask in masks])
    entries = [np.flatnonzero(part) for part in np.split(flags, ends[:-1])]
    padded = [np.pad(each, (0, -len(each) % round_to), constant_values=-1) for each in entries]
    joined = torch.from_numpy(np.concatenate(padded)).to(devices[0])
    lists = list(joined.split([len(each) for each in padded]))
    for keep, kept in zip(lists, entries, strict=True):
        _remember(keep, kept)
    return lists


def entries_of(keep: Tensor, name: str) -> Channels:
    """The channels in a keep list, on the host, without its -1.

    Raises:
        InputError: they don't ascend, repeat, are below -1, or a -1 is not at the end; ``name`` is the argument's.
    """
    known: _Known | None = _known.get(keep)
    if known is not None and not keep.is_inference() and known.version == keep._version:
        return known.entries
    numbers: Channels = keep.detach().cpu().numpy()
    count = int((numbers >= 0).sum())
    entries: Channels = numbers[:count].copy()
    if (numbers < -1).any():
        raise InputError(f"{name}: wanted channels from 0 on (-1 for a channel of zeros), got {numbers.min()}")
    if (entries < 0).any():
        raise InputError(f"{name}: wanted -1 at the end only, got {_shown(numbers)}")
    if (np.diff(entries) <= 0).any():
        raise InputError(f"{name}: wanted ascending channels, each once, got {_shown(numbers)}")
    _remember(keep, entries)
    return entries


def _remember(keep: Tensor, entries: Channels) -> None:
    if not keep.is_inference():  # those have no version that would tell of a change
        _known[keep] = _Known(keep._version, entries)


def check_keep_list(keep: object, name: str, channels: int, device: torch.device) -> None:
    """Raise unless ``keep`` is a keep list of a tensor with so many channels.

    What it holds is left alone where nobody can look: while a graph is made or captured, and on a device without
    memory.
    """
    _check_vector(keep, name, device, (torch.int64,))
    assert isinstance(keep, Tensor)
    if not keep.is_contiguous():
        raise InputError(f"{name}: wanted a contiguous list, got strides {keep.stride()}")
    if _is_readable(keep):
        entries = entries_of(keep, name)
        if len(entries) and entries[-1] >= channels:
            raise InputError(f"{name}: wanted channels below {channels}, got {entries[-1]}")


def check_keep(keep: object, name: str, channels: int, device: torch.device, packed: bool) -> None:
    """Raise unless ``keep`` is a bool mask ``[channels]``, which packed tensors don't take, or a keep list."""
    if isinstance(keep, Tensor) and keep.dtype == torch.bool and packed:
        raise InputError(
            f"{name}: wanted a keep list with packed=True, whose length is that of a dimension, got a bool mask; "
            "keep_lists makes lists of masks"
        )
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        _check_vector(keep, name, device, (torch.bool, torch.int64))
        check_keep_list(keep, name, channels, device)
        return
    _check_vector(keep, name, device, (torch.bool,))
    if keep.shape[0] != channels:
        raise InputError(f"{name}: wanted a mask of shape ({channels},), got {tuple(keep.shape)}")


def _check_vector(value: object, name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    wanted = {torch.bool: "a bool mask [C]", torch.int64: "an int64 list [K]"}
    either = " or ".join(wanted[dtype] for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: wanted {either}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise InputError(f"{name}: wanted a dense tensor, got layout {value.layout}")
    if value.dtype not in dtypes or value.dim() != 1:
        raise InputError(f"{name}: wanted {either}, got {value.dtype} {tuple(value.shape)}")
    if value.device != device:
        raise InputError(f"{name}: wanted it on {device}, got it on {value.device}")


def _is_readable(keep: Tensor) -> bool:
    # First of all what the compiler knows to be false: it should see nothing of the rest.
    if torch.compiler.is_compiling() or library.is_watched() or type(keep) is not Tensor or keep.is_meta:
        return False
    return not (keep.is_cuda and torch.cuda.is_current_stream_capturing())


def _shown(numbers: Channels) -> str:
    text = ", ".join(str(number) for number in numbers[:8])
    return f"[{text}{', ...' if len(numbers) > 8 else ''}]"
