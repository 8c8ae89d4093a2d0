"""The environment of a run: versions, device, command line, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import torch
from accelerate import Accelerator

from dpo_cli.modeling.determinism import gpu_software
from dpo_cli.reporting.secrets import covered_command

_PACKAGES = ("dpo-cli", "torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Describe the environment of this process, without environment variables and secrets of the command line."""
    device = accelerator.device
    on_cuda = device.type == "cuda"
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "device_type": device.type,
        **(gpu_software() if on_cuda else {}),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "command_line": covered_command(sys.argv),
        "git_commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the working directory, if it is a git work tree."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
