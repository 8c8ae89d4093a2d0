"""Quantized checkpoints are refused: told by their settings and by the headers of their weights, before they are read.

What has 4 or 8 bits a weight cannot take the steps of an optimizer, and libraries that load it keep marks and scales
beside the weights that no other program reads once the weights have moved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.errors import UserError

_SETTINGS = ("quantization_config", "compression_config", "quantization")
"""Under which of them a `config.json` says how its weights are quantized."""

_CONVERTED = (
    "train its unquantized original; or dequantize it once: load it in transformers with `{}`, save it, train that"
)
_HINTS = {
    "fp8": _CONVERTED.format("quantization_config=FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": _CONVERTED.format("quantization_config=Mxfp4Config(dequantize=True)"),
    "compressed-tensors": _CONVERTED.format("quantization_config=CompressedTensorsConfig(run_compressed=False)"),
    "bitsandbytes": "train its unquantized original; or load it in transformers, `dequantize()` it, and save it",
}
_HINT = "train its unquantized original, which its model card names"

_FEW_BITS = re.compile(r"F[468]_\w+")
"""The types, in safetensors files, of weights that mean nothing without their scales."""

_SCALES = re.compile(
    r"\.(weight_scale(_inv|_2)?|weight_packed|qweight|qzeros|SCB|weight\.(absmax|quant_map|quant_state\..*))$"
    r"|_(blocks|scales)$"
)
"""How the parts of a quantized weight are called."""

_MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself reads at most."""


def check_unquantized(settings: Mapping[str, Any]) -> None:
    """Refuse a `config.json` that says that the weights are quantized.

    Raises:
        UserError: It says so.
    """
    for inner in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        for name in _SETTINGS:
            # transformers takes an empty one for quantized as well.
            if (found := inner.get(name)) not in (None, False):
                raise _quantized(str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown")


def check_headers(files: list[Path]) -> None:
    """Refuse safetensors files whose headers name quantized weights; a damaged one is left to the loader.

    Raises:
        UserError: They do.
    """
    for file in files:
        for name, dtype in _tensors(file):
            if _FEW_BITS.fullmatch(dtype) or _SCALES.search(name):
                method = "fp8" if dtype.startswith("F8") or name.endswith("weight_scale_inv") else "unknown"
                raise _quantized(method, f"`{name}` is {dtype}")


def _quantized(method: str, because: str = "") -> UserError:
    """Say how a model is quantized, and what works instead."""
    known = method if method != "unknown" else "by an unnamed method"
    what = f"its weights are quantized ({because or known}), and such weights cannot be trained or scored here"
    return UserError(what, None, _HINTS.get(method, _HINT))


def _tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Yield name and type of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _MOST_HEADER_BYTES:
            return
        header = json.loads(opened.read(size))
    for name, facts in header.items():
        if name != "__metadata__":
            yield name, str(facts["dtype"])
