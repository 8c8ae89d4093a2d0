"""Where a CPU gets its memory: whether what is freed is kept for the next step or handed back at once.

Both speak to glibc; with another C library nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NEVER = -1, -3, -1
_LARGE_BYTES = 3 * 2**18
_LARGE_PAGE, _MADV_HUGEPAGE = 2**21, 14


def keep_freed_memory(num_bytes: int) -> None:
    """Keep what is freed, since the next step takes about the same again, and take it in large pages.

    The system then fills nothing with zeros anew, and has fewer places to look up. What it costs are gaps between
    tensors that nothing fits into, about as large as the gradients.

    Args:
        num_bytes: What the run is going to take from here on; what comes on top of it is had in small pages.
    """
    _settle(_NEVER)
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        # Nothing is filled by this: the heap grows, is marked, and is free again.
        if block := library.malloc(num_bytes):
            start, stop = -(-block // _LARGE_PAGE) * _LARGE_PAGE, (block + num_bytes) // _LARGE_PAGE * _LARGE_PAGE
            if start < stop:
                library.madvise(start, stop - start, _MADV_HUGEPAGE)
            library.free(block)


def return_freed_memory() -> None:
    """Hand tensors above `_LARGE_BYTES` back to the system as soon as they are freed, so that gaps stay small."""
    _settle(_LARGE_BYTES)


def hand_back_freed_memory() -> None:
    """Hand back at once what was freed until now, small tensors included, of which passes before step 1 leave many."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def take_over_weights(model: PreTrainedModel) -> None:
    """Copy weights that train and are pages of a mapped file into memory of their own, before the first step.

    Else the system copies them page by page in the middle of that step, which writes to them and takes ten times as
    long. What does not train stays as it is: beside the file, a copy would take its bytes a second time.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _settle(mapped_from: int) -> None:
    """Tell the C library from which size on tensors get pages of their own; what smaller ones leave is kept."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, mapped_from)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
