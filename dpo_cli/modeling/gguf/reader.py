"""The reader of the package `gguf` without its cost: seconds, and much memory, for the tokens of a vocabulary."""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from dpo_cli.errors import UserError
from dpo_cli.modeling.gguf.content import DAMAGED, GgufContent

_START = struct.Struct("<IQ")
"""How an array begins: with the type of its elements, and their number."""

_LENGTH = struct.Struct("<Q")


class Reader(gguf.GGUFReader):
    """Takes arrays out of ordinary memory, where each slice of a mapped file is three slow objects of numpy."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Return the size of a value, its parts, which of them are the content, and its types."""
        if raw_type == GGUFValueType.ARRAY and self.byte_order == "I":
            data: Any = np.asarray(self.data)
            number, count = _START.unpack_from(data, orig_offs)
            kind, start = GGUFValueType(number), orig_offs + _START.size
            if kind != GGUFValueType.ARRAY:
                dtype = self.gguf_scalar_to_np.get(kind)
                parts, end = _numbers(data, start, count, dtype) if dtype else _strings(data, start, count)
                return end - orig_offs, parts, [*range(count)], [GGUFValueType.ARRAY, *([kind] if count else [])]
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        """Find the tensors in the file, which has to reach to the end of each.

        Raises:
            UserError: It ends before.
        """
        end = max((start_offs + _end_of(field) for field in fields), default=0)
        if end > len(self.data):
            what = f"the GGUF file ends early: it has {len(self.data):,} bytes, and its weights end at byte {end:,}"
            raise UserError(what, None, DAMAGED)
        super()._build_tensors(start_offs, fields)


def _end_of(field: Any) -> int:
    """Return where a tensor ends, counted from where the first one begins."""
    *_, sizes, kind, offset = field.parts
    numbers, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
    return int(offset[0]) + int(math.prod(sizes.tolist())) // numbers * num_bytes


def read_content(file: Path) -> GgufContent:
    """Return what is asked of a GGUF file.

    Raises:
        UserError: It ends early, or its header is damaged.
    """
    try:
        return GgufContent.of(Reader(file))
    except (ValueError, LookupError, TypeError, OverflowError, struct.error, RecursionError) as error:
        # What the package raises where numbers and names in it are not what was written.
        if "version" in str(error):
            what, hint = (
                "the package `gguf` does not read this version of GGUF files",
                "update it: `pip install -U gguf`",
            )
            raise UserError(what, None, hint) from error
        raise UserError("the header of the GGUF file cannot be read", None, DAMAGED) from error


def _numbers(data: Any, start: int, count: int, dtype: Any) -> tuple[list[Any], int]:
    """Return numbers, each of them an array, and where they end."""
    end = start + count * np.dtype(dtype).itemsize
    return [*data[start:end].view(dtype).reshape(count, 1)], end


def _strings(data: Any, start: int, count: int) -> tuple[list[Any], int]:
    """Return strings, each of them an array of bytes, and where they end."""
    strings = []
    for _ in range(count):
        begin = start + _LENGTH.size
        start = begin + _LENGTH.unpack_from(data, start)[0]
        strings.append(data[begin:start])
    return strings, start


@contextlib.contextmanager
def fast_reading() -> Iterator[None]:
    """Let transformers read files with `Reader`, and build the map of names once, not for each module of a model."""
    fast = {"GGUFReader": Reader, "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map)}
    before = {name: getattr(gguf, name) for name in fast}
    # transformers takes them from the package each time.
    vars(gguf).update(fast)
    try:
        yield
    finally:
        vars(gguf).update(before)
