"""What computes here, and the libraries it computes with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from torch.backends import cpu

from dpo_cli.doctor.findings import Finding
from dpo_cli.modeling.determinism import gpu_software
from dpo_cli.reporting.console import gib

_PROGRAM = "dpo-cli"
_EXTRA = re.compile(r"""extra == ['"](.+?)['"]""")
_FOR_USERS = ("gguf", "adapters", "8bit", "quantize", "tensorboard", "wandb", "mlflow")
"""The extras that add something to the program; others are for who works on it."""


def check_device(device: torch.device) -> Iterator[Finding]:
    """Say what computes: processors, and GPUs where torch can use them."""
    yield _processor()
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)
    software = gpu_software()
    said = ", ".join(f"{name} {version}" for name, version in software.items())
    lacks = software["triton"] == "not installed"
    hint = "install `triton`, which torch compiles kernels with; until then `training.attention: varlen` needs none"
    yield Finding("device", "CUDA", "wrong" if lacks else "ok", said, hint * lacks, software)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    detail = "the card computes in it" if native else "the card only emulates it; `model.dtype: auto` takes float32"
    yield Finding("device", "bfloat16", "ok" if native else "not here", detail)


def _processor() -> Finding:
    memory, threads = psutil.virtual_memory(), torch.get_num_threads()
    name = platform.processor() or platform.machine()
    free = f"{gib(memory.available)} of {gib(memory.total)} of memory free"
    detail = f"{name}, {cpu.get_cpu_capability()}, {threads} threads; {free}"
    figures = {"name": name, "threads": threads, "memory_bytes": memory.total, "free_bytes": memory.available}
    return Finding("device", "CPU", "ok", detail, figures=figures)


def _no_gpu() -> Finding:
    """Say why there is no GPU: there is none, or torch cannot use it, which is a fault of the installation."""
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia/version").exists():
        return Finding("device", "GPU", "not here", "no GPU and no NVIDIA driver: runs compute on the CPU")
    if torch.version.cuda is None:
        what = f"there is an NVIDIA driver, but torch {torch.__version__} was built without CUDA"
        return Finding("device", "GPU", "wrong", what, "install a build of torch with CUDA: https://pytorch.org")
    what = f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    hint = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that the driver is new enough for that CUDA"
    return Finding("device", "GPU", "wrong", what, hint)


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    detail = f"{properties.name}, compute capability {capability}; {gib(free)} of {gib(total)} of memory free"
    figures = {"name": properties.name, "capability": capability, "memory_bytes": total, "free_bytes": free}
    built = [name for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    # A build for 8.0 runs on 8.6: newer cards of one generation run what was built for older ones.
    fits = not built or any(
        int(name.removeprefix("sm_").rstrip("af")) // 10 == properties.major
        and int(name.removeprefix("sm_").rstrip("af")) % 10 <= properties.minor
        for name in built
    )
    hint = f"this torch was built for {', '.join(built)}: install one that was built for this card"
    return Finding("device", f"GPU {index}", "ok" if fits else "wrong", detail, hint * (not fits), figures)


def check_libraries(device: torch.device) -> Iterator[Finding]:
    """Compare what is installed with what the program asks for."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(_PROGRAM) or ()]
    except importlib.metadata.PackageNotFoundError:
        hint = "install it with `pip install .` in its folder"
        yield Finding("libraries", _PROGRAM, "not here", "the program runs without having been installed", hint)
        return
    findings = [_library(requirement, extra) for requirement, extra in _wanted(requirements)]
    right = {finding.name: finding.detail for finding in findings if finding.state == "ok"}
    versions = {"Python": platform.python_version(), **right}
    detail = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("libraries", "installed", "ok", detail, figures={"versions": versions})
    yield from (finding for finding in findings if finding.state != "ok")


def _wanted(requirements: Sequence[Requirement]) -> Iterator[tuple[Requirement, str | None]]:
    """Yield what the program needs, and what its extras for users do, with the extra's name."""
    for requirement in requirements:
        extra = _EXTRA.search(str(requirement.marker or ""))
        if extra is None or (extra[1] in _FOR_USERS and requirement.name != _PROGRAM):
            yield requirement, extra[1] if extra else None


def _library(requirement: Requirement, extra: str | None) -> Finding:
    """Compare one package with what is asked for."""
    name, wanted = requirement.name, str(requirement.specifier)
    install = f"pip install '{_PROGRAM}[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    found = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version(name)
    figures = {"version": found, "wanted": wanted, "extra": extra}
    if found is None and extra:
        detail = f"not installed; comes with the extra `{extra}`"
        return Finding("libraries", name, "not here", detail, f"`{install}`", figures)
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        detail = f"{found or 'not installed'}, but {wanted} is needed"
        return Finding("libraries", name, "wrong", detail, f"`{install}`", figures)
    return Finding("libraries", name, "ok", found, figures=figures)
