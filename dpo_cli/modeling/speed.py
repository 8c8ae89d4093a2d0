"""How many tokens a forward pass needs before more of them no longer make it faster, measured on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_cli.system.storage import cache_root, text_digest, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VERSION = "1"
_SMALLEST, _LARGEST = 512, 16384
_WORTHLESS = 0.01
"""Share of a pass that adding up gradients may take; what is left to gain is then no longer worth its memory."""

_ROWS = 1024
_BUFFER_BYTES = 2**27
_REPEATS = 9


def enough_tokens(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> int:
    """Return the fewest tokens, a power of two, with which training runs at nearly its best speed.

    What a pass gains from more tokens is that gradients are added up less often, which takes as long for few
    tokens as for many: three matrix products a token stand against one addition a pass. Both are measured in a
    moment, on the model's largest matrix, and their ratio is rounded down to a power of two. The answer is
    kept in the cache, so that on one machine every run of a model is cut alike.

    Args:
        model: The model; its weights may be missing.
        dtype: What is computed in.
        device: Where it is going to be.
    """
    matrices = [p for p in model.base_model.parameters() if _is_matrix(model, p)]
    shape = tuple(max(matrices, key=lambda matrix: matrix.numel()).shape)
    about = [*shape, dtype, _device_name(device), torch.get_num_threads(), torch.__version__]
    file = cache_root() / "speed" / f"{text_digest(_VERSION, *map(str, about))[:32]}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["enough_tokens"]
        if known in range(_SMALLEST, _LARGEST + 1):
            return int(known)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _measure(torch.ones(shape, dtype=dtype, device=device))
    # Where it cannot be kept it is measured again.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"enough_tokens": found, "about": list(map(str, about))}) + "\n")
    return found


def _measure(weight: Tensor) -> int:
    """Weigh the time of one matrix's products against that of adding up its gradient."""
    # Of a size that no cache holds, as a model's gradients are.
    gradients, more = torch.zeros(2, _BUFFER_BYTES // 4, device=weight.device)
    adding = shortest_seconds(lambda: gradients.add_(more)) * weight.numel() / gradients.numel()
    states = torch.ones(_ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    product = shortest_seconds(lambda: states @ weight.T) / _ROWS
    wanted = adding / (_WORTHLESS * 3 * product)
    return int(min(max(2 ** math.floor(math.log2(wanted)), _SMALLEST), _LARGEST))


def shortest_seconds(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Return the shortest time of a few."""
    best = math.inf
    for _ in range(repeats):
        _finish()
        started = time.perf_counter()
        work()
        _finish()
        best = min(best, time.perf_counter() - started)
    return best


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_matrix(model: PreTrainedModel, parameter: Tensor) -> bool:
    """Tell a layer's matrix from a vector and from the embedding, which is looked up and not multiplied."""
    return parameter.ndim == 2 and parameter is not model.get_input_embeddings().weight


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return device.type
    return next((line for line in lines if line.startswith("model name")), device.type)
