"""Matrix products and copies on this device: whether they are right, whether they repeat, and how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dpo_cli.doctor.findings import Finding
from dpo_cli.modeling.exactness import TOLERANCES, precisions_on

_SECONDS = 0.8
"""How long a product or a copy is repeated; the fastest counts."""

_SIZES = {"cuda": 8192, "cpu": 1024}
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}


def check_products(device: torch.device) -> Iterator[Finding]:
    """Multiply matrices in each precision of runs, and copy memory."""
    for dtype in precisions_on(device):
        yield _product_finding(dtype, device)
    per_second = memory_speed(device)
    detail = f"{per_second / 1e9:,.0f} GB/s, read and written by a copy"
    yield Finding("products", "memory", "ok", detail, figures={"bytes_per_second": per_second})


def _product_finding(dtype: str, device: torch.device) -> Finding:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    wanted = left.double() @ right.double()
    left, right = left.to(device), right.to(device)
    found = left @ right
    off = float((found.double().cpu() - wanted).norm() / wanted.norm())
    repeats = all(torch.equal(left @ right, found) for _ in range(3))
    flops = product_speed(dtype, device)
    figures = {"off": off, "repeats": repeats, "flops_per_second": flops}
    if not off <= TOLERANCES[dtype]:
        what = f"off by {off:.1g} of float64, more than {TOLERANCES[dtype]:g}"
        hint = "check whether the environment allows TF32 (NVIDIA_TF32_OVERRIDE, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)"
        return Finding("products", dtype, "wrong", what, hint, figures)
    if not repeats:
        what = "the same product gives other bytes the second time, with deterministic kernels"
        hint = "check the card and its driver; a run cannot be resumed bit for bit here"
        return Finding("products", dtype, "wrong", what, hint, figures)
    detail = f"within {off:.0e} of float64, the same bytes each time; {flops / 1e12:,.2f} TFLOP/s"
    return Finding("products", dtype, "ok", detail, figures=figures)


def product_speed(dtype: str, device: torch.device, size: int | None = None) -> float:
    """Return the floating-point operations a second of a product of square matrices, at its fastest.

    Args:
        dtype: The precision, by its name in torch.
        device: Where it is computed.
        size: Rows of a matrix; by default enough for a device of its kind.
    """
    size = size or _SIZES.get(device.type, 1024)
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    target = torch.empty_like(left)
    return 2 * size**3 / fastest(lambda: torch.mm(left, right, out=target), device)


def memory_speed(device: torch.device) -> float:
    """Return the bytes a second that a large copy reads and writes together, at its fastest."""
    size = _COPIED_BYTES.get(device.type, 2**27)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], Tensor], device: torch.device, seconds: float = _SECONDS) -> float:
    """Repeat work for some seconds, twice at least; return the seconds of the fastest time."""
    begun, best, times = time.perf_counter(), float("inf"), 0
    while times < 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first call loads kernels and takes memory.
        best, times = min(best, time.perf_counter() - started) if times else best, times + 1
    return best
