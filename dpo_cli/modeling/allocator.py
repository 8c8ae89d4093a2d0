"""Where a CPU gets its memory: whether what is freed is kept for the next step or handed back at once.

Both speak to glibc; with another C library nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
_LARGE_BYTES = 3 * 2**18


def keep_freed_memory() -> None:
    """Keep what is freed, since the next step takes about the same again.

    The system then fills nothing with zeros anew. What it costs are gaps between tensors that nothing fits into,
    about as large as the gradients.
    """
    _settle(_LARGEST_INT)


def return_freed_memory() -> None:
    """Hand tensors above `_LARGE_BYTES` back to the system as soon as they are freed, so that gaps stay small."""
    _settle(_LARGE_BYTES)


def take_over_weights(model: PreTrainedModel) -> None:
    """Copy weights that are pages of a mapped file into memory of their own, before the first step writes to them.

    Else the system copies them page by page in the middle of that step, which takes ten times as long.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _settle(mapped_from: int) -> None:
    """Tell the C library from which size on tensors get pages of their own; what smaller ones leave is kept."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, mapped_from)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
