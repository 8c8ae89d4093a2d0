"""The types that a GGUF file keeps weights in: which of them a tensor gets, and what becomes of its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from dpo_cli.errors import FAILED, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
"""What the weights of a file can be kept in: those that the package `gguf` makes of any numbers."""

_FLOATS = ("f32", "f16", "bf16")
_BLOCK = 32
"""How many numbers of a row share a scale in the other types."""

_MOST = {"f32": 3.4e38, "bf16": 3.38e38, "f16": 65504.0, "q8_0": 127 * 65504.0, "q5_1": 65504.0, "q5_0": 16 * 65504.0,
         "q4_1": 65504.0, "q4_0": 8 * 65504.0}  # fmt: skip
"""The largest magnitude that a type holds: scales are float16."""

_FARTHEST = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 254, "q5_1": 1 / 31, "q5_0": 1 / 16, "q4_1": 1 / 15,
             "q4_0": 1 / 8}  # fmt: skip
"""How far a number may be from what is read of it, as a share of the largest beside it: half a step of the type.

Of q5_0 and q4_0 it is a whole step: on one side of 0 they have one step less.
"""

_SCALES, _SMALLEST = 2**-8, 2**-18
"""What float16 adds to that, in which scales are: a share, and where scales are next to 0."""

_FLOAT32 = re.compile(
    r".*_norm\.weight|position_embd\.weight|token_types\.weight|rope_\w+\.weight"
    r"|blk\.\d+\.(ffn_gate_inp(_shexp)?|ssm_\w+|shortconv\.conv|exp_probs_b)(\.\w+)?"
)
"""Tensors that llama.cpp reads in float32 alone, however many dimensions they have."""

_IN_BLOCKS = re.compile(r"blk\.\d+\.(ssm_(in|out|x|alpha|beta))\.weight")
"""Matrices whose names are like those of such tensors."""

_CHUNK = 2**18
"""How many numbers are quantized at a time: the package takes several times their memory."""


def type_of(name: str, shape: Sequence[int], kind: GgufType) -> GgufType:
    """Return the type that a tensor gets in a file of a type.

    Args:
        name: Its name in the file.
        shape: Its shape, of which the last dimension is a row of the file.
        kind: The type of the file.
    """
    if len(shape) < 2 or (_FLOAT32.fullmatch(name) and not _IN_BLOCKS.fullmatch(name)):
        return "f32"
    return kind if kind in _FLOATS or shape[-1] % _BLOCK == 0 else "f16"


def check_range(tensor: Tensor, kind: GgufType, name: str) -> None:
    """Refuse a tensor that a type cannot hold.

    Raises:
        UserError: A number of it is too large, or none.
    """
    largest = _largest(tensor)
    if not largest <= _MOST[kind]:
        what = f"{kind} cannot hold `{name}`: its largest weight is {largest:.3g}"
        raise UserError(what, None, "choose `--gguf bf16` or `--gguf f32`" if largest < _MOST["bf16"] else None)


def check_rounding(tensor: Tensor, read: Tensor, kind: GgufType, name: str) -> None:
    """Refuse what is read of a tensor where it is another than rounding explains.

    Raises:
        UserError: A number is further from the tensor's than the type allows.
    """
    if kind == "f32" or not tensor.numel():
        return
    allowed = (_FARTHEST[kind] + _SCALES) * _largest(tensor) + _SMALLEST
    for rows, others in zip(chunks(tensor), chunks(read), strict=True):
        if (far := float((rows - others).abs().max())) <= allowed:
            continue
        what = f"rounding to {kind} changes a weight of `{name}` by {far:.3g}, where its steps explain {allowed:.3g}"
        hint = "nothing was written; update the package `gguf`, or report this"
        raise UserError(what, None, hint, status=FAILED)


def encoded(tensor: Tensor, kind: GgufType) -> Iterator[NDArray[Any]]:
    """Yield a tensor as a file holds it, some rows at a time.

    Args:
        tensor: On the host, of floats, with rows of the file along its last dimension.
        kind: The type.
    """
    import gguf

    ggml = gguf.GGMLQuantizationType[kind.upper()]
    for rows in chunks(tensor):
        yield gguf.quantize(rows.float().numpy(), ggml)


def rounded(tensor: Tensor, kind: GgufType) -> Tensor:
    """Return a tensor as it is read from a file that holds it in a type, in its own dtype and on its own device."""
    import gguf
    import torch

    if kind == "f32":
        return tensor
    ggml, read = gguf.GGMLQuantizationType[kind.upper()], torch.empty(tensor.numel(), dtype=tensor.dtype)
    for chunk, blocks in zip(chunks(read.reshape(tensor.shape)), encoded(tensor.detach().cpu(), kind), strict=True):
        chunk.copy_(torch.from_numpy(gguf.dequantize(blocks, ggml)))
    return read.reshape(tensor.shape).to(tensor.device)


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's rows, as many at a time as are quantized together: views, where its rows lie evenly apart."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    yield from rows.split(max(1, _CHUNK // rows.shape[-1]))


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude, without a second tensor of the same size; NaN where there is one."""
    if not tensor.numel():
        return 0.0
    least, most = map(float, tensor.aminmax())
    return max(-least, most)
