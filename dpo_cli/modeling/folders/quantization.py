"""Quantized checkpoints are refused: told by their settings and by the headers of their weights, before they are read.

What has 4 or 8 bits a weight cannot take the steps of an optimizer, and libraries that load it keep marks and scales
beside the weights that no other program reads once the weights have moved.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

_FEW_BITS = re.compile(r"(F|float)[468]_\w+")
"""The types of weights that mean nothing without their scales, as safetensors files and torch call them."""

_MOVABLE = re.compile(r"(F|BF|float|bfloat)\d+")
"""The types of weights that an optimizer can move."""

_WEIGHT = re.compile(r"(weight|_proj)$")
"""How weights are called, other than masks and tables, which may be whole numbers."""

_SCALES = re.compile(
    r"\.(weight_(scales?|scale_inv|scale_2|zero_point|packed|format)|_weight_(qdata|scale|zero_point)|qweight|qzeros"
    r"|g_idx|SCB|weight\.(absmax|quant_map|quant_state\..*|_data|_scale|_shift)|W_q|codebooks|[kvq]_scale"
    r"|(in|out)put_scale)$|_(blocks|scales)$"
)
"""How the parts of a quantized weight are called, and the scales of what goes from layer to layer."""

_MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself reads at most."""


def check_unquantized(settings: Mapping[str, Any]) -> None:
    """Refuse a `config.json` that says that the weights are quantized, be it those of a model within.

    Raises:
        UserError: It says so.
    """
    for name in _SETTINGS:
        # transformers takes an empty one for quantized as well.
        if (found := settings.get(name)) not in (None, False):
            raise _quantized(str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown")
    for inner in settings.values():
        if isinstance(inner, dict):
            check_unquantized(inner)


def check_headers(files: list[Path]) -> None:
    """Refuse safetensors files by their headers: quantized weights, and two contents of one weight.

    A damaged file is left to the loader.

    Raises:
        UserError: They have such.
    """
    holding: dict[str, _Place] = {}
    for file in files:
        for name, dtype, place in _tensors(file):
            _check_type(name, dtype)
            other = holding.setdefault(name, place)
            if other != place and other.content() != place.content():
                what = f"`{name}` is in {other.file.name} and, with other values, in {place.file.name}"
                raise UserError(what, None, "remove it from one of the files: which of them is used is undefined")


def check_pickles(files: list[Path]) -> None:
    """Refuse quantized weights in pickled files, which are read as bare tensors without their content.

    Raises:
        UserError: They have such.
    """
    import torch

    for file in files:
        mapped = zipfile.is_zipfile(file)
        for name, tensor in torch.load(file, map_location="meta", weights_only=True, mmap=mapped).items():
            if isinstance(tensor, torch.Tensor):
                _check_type(name, str(tensor.dtype).removeprefix("torch."))


def _check_type(name: str, dtype: str) -> None:
    """Refuse a tensor that is a quantized weight, or a part of one, by its name and type."""
    if _FEW_BITS.fullmatch(dtype) or _SCALES.search(name) or (_WEIGHT.search(name) and not _MOVABLE.fullmatch(dtype)):
        fp8 = dtype.lower().startswith(("f8", "float8")) or name.endswith("weight_scale_inv")
        raise _quantized("fp8" if fp8 else "unknown", f"`{name}` is {dtype}")


def _quantized(method: str, because: str = "") -> UserError:
    """Say how a model is quantized, and what works instead."""
    known = method if method != "unknown" else "by an unnamed method"
    what = f"its weights are quantized ({because or known}), and quantized weights cannot be trained or scored"
    return UserError(what, None, _HINTS.get(method, _HINT))


class _Place(NamedTuple):
    """Where the bytes of a tensor are: its file, the first byte, and how many."""

    file: Path
    start: int
    size: int

    def content(self) -> bytes:
        """Read them."""
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            return opened.read(self.size)


def _tensors(file: Path) -> Iterator[tuple[str, str, _Place]]:
    """Yield name, type and place of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _MOST_HEADER_BYTES:
            return
        header = json.loads(opened.read(size))
    for name, facts in header.items():
        if name != "__metadata__":
            start, stop = facts["data_offsets"]
            yield name, str(facts["dtype"]), _Place(file, 8 + size + start, stop - start)
