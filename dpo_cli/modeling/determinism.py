"""Kernels that give the same bytes every time, and what a GPU's bytes depend on beside them.

Kernels of CPUs are deterministic as torch is configured by default; nothing here changes anything for them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dpo_cli.errors import FAILED, UserError

_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""What cuBLAS reads before its first product, and the values under which its products are deterministic."""

_NO_KERNEL = re.compile(r"([^\n]+) does not have a deterministic implementation")
_DRIVER = re.compile(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s")
_MEMORY: Any = torch.utils.deterministic
_SETTING = "`training.deterministic`"


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Let torch take deterministic kernels alone on CUDA while the context lasts, where that is wanted.

    It has to be entered before the first matrix product on CUDA.

    Raises:
        UserError: The environment configures cuBLAS otherwise; or, within the context, an operation has no such
            kernel.
    """
    if not torch.cuda.is_available():
        yield
        return
    if wanted and (asked := os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])) not in _WORKSPACES:
        hint = f"unset it, set it to `{_WORKSPACES[0]}`, or set `training.deterministic: false`"
        raise UserError(f"under {_WORKSPACE}={asked} matrix products are not deterministic", "the environment", hint)
    before = _state()
    # Memory that is not written yet needs no NaN: whatever reads it would be a defect of ours, on CPUs as well.
    _set((wanted, False, wanted))
    try:
        yield
    except RuntimeError as error:
        if not (lacking := _NO_KERNEL.search(str(error))):
            raise
        what = f"the operation {lacking[1]} of this model has no deterministic kernel on this GPU"
        hint = f"set {_SETTING[1:-1]}: false; two runs, and a resumed one, may then differ in the last bits"
        raise UserError(what, _SETTING, hint, status=FAILED) from error
    finally:
        _set(before)


def _state() -> tuple[bool, bool, bool]:
    """Return torch's switches: deterministic kernels, filling of new memory, and the same choice by the compiler."""
    from torch._inductor import config as inductor

    return torch.are_deterministic_algorithms_enabled(), _MEMORY.fill_uninitialized_memory, inductor.deterministic


def _set(state: tuple[bool, bool, bool]) -> None:
    from torch._inductor import config as inductor

    torch.use_deterministic_algorithms(state[0])
    _MEMORY.fill_uninitialized_memory = state[1]
    # Its kernels are otherwise chosen by how fast they were at a first try, and add up in different orders.
    inductor.deterministic = state[2]


def gpu_software() -> dict[str, str]:
    """Return the versions of what computes on a GPU beside torch, by name."""
    return {
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "driver": _driver() or "unknown",
        "triton": _version_of("triton"),
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, where there is one and it says so."""
    with contextlib.suppress(OSError):
        if found := driver_in(Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")):
            return found
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(said.split()), None)


def driver_in(text: str) -> str | None:
    """Return the version that Linux's NVIDIA driver gives in what it says of itself, or None."""
    found = _DRIVER.search(text)
    return found[1] if found else None
