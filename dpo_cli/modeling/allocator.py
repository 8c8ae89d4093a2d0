"""Where a CPU gets its memory: whether what is freed is kept for the next step or handed back at once.

Both speak to glibc; with another C library nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NEVER = -1, -3, -1
_LARGE_BYTES = 3 * 2**18
_LARGE_PAGE, _MADV_HUGEPAGE, _MADV_DONTNEED = 2**21, 14, 4

_keeps = False
"""Whether freed memory is kept now."""


def keep_freed_memory(num_bytes: int) -> None:
    """Keep what is freed, since the next step takes about the same again, and take it in large pages.

    The system then fills nothing with zeros anew, and has fewer places to look up. What it costs are gaps between
    tensors that nothing fits into, about as large as the gradients.

    Args:
        num_bytes: What the run is going to take from here on; what comes on top of it is had in small pages.
    """
    global _keeps
    _settle(_NEVER)
    _keeps = True
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
    global _keeps
    _keeps = False
    _settle(_LARGE_BYTES)


def hand_back_freed_memory() -> None:
    """Hand back at once what was freed until now, small tensors included, of which passes before step 1 leave many.

    Where freed memory is kept, nothing is handed back.
    """
    if _keeps:
        return
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def take_over_weights(model: PreTrainedModel) -> None:
    """Copy weights that train and are pages of a mapped file into memory of their own, before the first step.

    Else the system copies them page by page in the middle of that step, which writes to them and takes ten times as
    long. What does not train stays as it is: beside the file, a copy would take its bytes a second time.
    """
    mapped = _mapped_files()
    for parameter in model.parameters():
        weights = parameter.data
        if parameter.requires_grad and any(start <= weights.data_ptr() < stop for start, stop in mapped):
            parameter.data = weights.clone()
            # Nobody reads them any more, and as long as another tensor of the file is there, its pages would stay.
            if weights.is_contiguous():
                _let_pages_go(weights.data_ptr(), weights.nbytes)


def _mapped_files() -> list[tuple[int, int]]:
    """Return from where to where files are mapped into memory; where that is not known, they may be everywhere."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return [(0, sys.maxsize)]
    # The fifth column is the number of the file; what is in no file has none.
    found = [line[0].split("-") for line in lines if line[4] != "0"]
    return [(int(start, 16), int(stop, 16)) for start, stop in found]


def _let_pages_go(start: int, num_bytes: int) -> None:
    """Let the system take back the whole pages of a mapped file within a range; who reads them again has them again."""
    first, end = -(-start // PAGESIZE) * PAGESIZE, (start + num_bytes) // PAGESIZE * PAGESIZE
    if sys.platform == "linux" and first < end:
        with contextlib.suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            library.madvise(first, end - first, _MADV_DONTNEED)


def _settle(mapped_from: int) -> None:
    """Tell the C library from which size on tensors get pages of their own; what smaller ones leave is kept."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, mapped_from)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
