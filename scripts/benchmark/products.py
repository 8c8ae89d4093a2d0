"""Says how fast matrix products are, in a process of its own that imports torch alone, so that it starts at once."""

from __future__ import annotations

import sys
import time

import torch

MATRIX = 2048
GPU_MATRIX = 8192
MATRIX_PRODUCTS = 8


def say_matrix_product_speed(device: str) -> None:
    """For every line that comes, say how many GFLOP/s matrix products reach now, at their best."""
    size, dtype = (GPU_MATRIX, torch.bfloat16) if device == "cuda" else (MATRIX, torch.float32)
    left, right, product = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(3))
    for _ in sys.stdin:
        best = float("inf")
        for _ in range(MATRIX_PRODUCTS):
            started = time.perf_counter()
            torch.matmul(left, right, out=product)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        print(2 * size**3 / best / 1e9, flush=True)


if __name__ == "__main__":
    say_matrix_product_speed(sys.argv[1])
