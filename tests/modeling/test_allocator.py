"""What is freed goes back to the system where it is asked for."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from dpo_cli.modeling.allocator import hand_back_freed_memory, keep_freed_memory, return_freed_memory

NUMBER, BYTES = 1000, 100_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="both speak to glibc")
def test_what_is_kept_is_not_handed_back():
    keep_freed_memory(NUMBER * BYTES)
    try:
        process = psutil.Process()
        tensors = [torch.ones(BYTES // 4) for _ in range(NUMBER)]
        del tensors
        before = process.memory_info().rss
        hand_back_freed_memory()
        assert before - process.memory_info().rss < 0.1 * NUMBER * BYTES
    finally:
        return_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="both speak to glibc")
def test_small_tensors_that_were_freed_are_handed_back():
    """Between them are tensors that stay, so that nothing is handed back by itself."""
    return_freed_memory()
    process = psutil.Process()
    tensors = [torch.ones(BYTES // 4) for _ in range(NUMBER)]
    kept = tensors[:: NUMBER // 10]
    del tensors
    before = process.memory_info().rss
    hand_back_freed_memory()
    assert before - process.memory_info().rss > 0.5 * NUMBER * BYTES
    assert all(bool((tensor == 1).all()) for tensor in kept)
