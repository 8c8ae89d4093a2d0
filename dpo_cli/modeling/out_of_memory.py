"""How libraries say that memory has run out: one answer for all of their words."""

from __future__ import annotations

import re

import torch

_WORDS = re.compile(r"out of memory|can't allocate memory|CU\w+_STATUS_ALLOC_FAILED", re.IGNORECASE)
"""How errors of other types say it: torch's allocator on a CPU, CUDA itself and the libraries over it."""

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMG]iB|\d+ bytes)")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is too little memory, of the device or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def asked_for(error: BaseException) -> str:
    """Return how much was asked for when memory ran out, as the library wrote it; empty where it did not say."""
    found = _ASKED.search(str(error))
    return found[1] if found else ""
