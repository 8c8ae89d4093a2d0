"""What is found of attention and log-probabilities on this device, held against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dpo_cli.doctor.findings import Finding
from dpo_cli.modeling.attention.kernels import KERNELS, Kernel
from dpo_cli.modeling.attention.trees import CannotPack
from dpo_cli.modeling.exactness import (
    TOLERANCES,
    attention_cases,
    attention_errors,
    logps_errors,
    precisions_on,
    random_tree,
)
from dpo_cli.modeling.tree import PrefixTree

_REPORT = "do not train with it here: report the line, with the versions above"


def check_attention(device: torch.device) -> Iterator[Finding]:
    """Hold every kernel that runs here against float64."""
    tree = random_tree()
    for kernel in KERNELS.values():
        if kernel.needs_cuda and device.type != "cuda":
            yield Finding("attention", kernel.name, "not here", "needs a GPU with CUDA")
        else:
            yield _kernel_finding(kernel, tree, device)


def _kernel_finding(kernel: Kernel, tree: PrefixTree, device: torch.device) -> Finding:
    """Sum up all cases of a kernel."""
    worst: dict[str, float] = {}
    refused, broken, wrong = [], [], []
    cases = attention_cases(precisions_on(device))
    for case in cases:
        try:
            off = max(attention_errors(kernel, tree, case, device))
        except CannotPack as refusal:
            refused.append(str(refusal))
        except Exception as error:
            broken.append(f"{case}: {first_line(error)}")
        else:
            worst[case.dtype] = max(worst.get(case.dtype, 0.0), off)
            if not off <= TOLERANCES[case.dtype]:
                wrong.append(f"{case}: off by {off:.1g} of float64, more than {TOLERANCES[case.dtype]:g}")
    figures = {"worst": worst, "cases": len(cases), "refused": len(refused), "broken": broken, "wrong": wrong}
    if wrong or (broken and not worst):
        return Finding("attention", kernel.name, "wrong", "; ".join([*wrong, *broken][:3]), _REPORT, figures)
    without = [*sorted(set(refused)), *(f"it broke in {len(broken)} cases, as in {one}" for one in broken[:1])]
    if not worst:
        return Finding("attention", kernel.name, "not here", "; ".join(without), figures=figures)
    done = len(cases) - len(refused) - len(broken)
    detail = f"{_within(worst)} of float64, forward and gradients, in {done} cases"
    detail += f"; not by this kernel: {'; '.join(without)}" if without else ""
    hint = "`training.attention: auto` takes another kernel for these cases" if broken else ""
    return Finding("attention", kernel.name, "ok", detail, hint, figures)


def check_logps(device: torch.device) -> Iterator[Finding]:
    """Hold log-probabilities of tokens against float64, with logits in one chunk and in many, and under a soft cap."""
    worst: dict[str, float] = {}
    wrong = []
    for dtype, softcap, chunk_bytes in itertools.product(precisions_on(device), (None, 5.0), (2**30, 2**16)):
        try:
            off = max(logps_errors(dtype, softcap, chunk_bytes, device))
        except Exception as error:
            wrong.append(f"{dtype}: {first_line(error)}")
            continue
        worst[dtype] = max(worst.get(dtype, 0.0), off)
        if not off <= TOLERANCES[dtype]:
            wrong.append(f"{dtype}{', soft cap' if softcap else ''}: off by {off:.1g}, more than {TOLERANCES[dtype]:g}")
    figures = {"worst": worst, "wrong": wrong}
    if wrong:
        yield Finding("logps", "log-probabilities", "wrong", "; ".join(wrong[:3]), _REPORT, figures)
    else:
        detail = f"{_within(worst)} of float64, forward and gradients"
        yield Finding("logps", "log-probabilities", "ok", detail, figures=figures)


def _within(worst: dict[str, float]) -> str:
    return " and ".join(f"{dtype} within {off:.0e}" for dtype, off in worst.items())


def first_line(error: Exception) -> str:
    """Say in one line what broke."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
