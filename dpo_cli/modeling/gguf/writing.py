"""A model becomes a GGUF file: what it is, its vocabulary, and its tensors, each of which is in memory once more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.folders.completeness import shown
from dpo_cli.modeling.folders.saving import disk_refusals, origin_of
from dpo_cli.modeling.gguf.about import add_provenance
from dpo_cli.modeling.gguf.header import Header
from dpo_cli.modeling.gguf.package import gguf_package
from dpo_cli.modeling.gguf.readback import read_back
from dpo_cli.modeling.gguf.tensors import FileTensors, Written
from dpo_cli.modeling.gguf.types import GgufType, check_range, encoded
from dpo_cli.system.storage import write_flushing
from dpo_cli.system.text import several

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufFile:
    """What was written.

    Attributes:
        path: The file.
        kind: The type that its weights are kept in.
        num_tensors: How many tensors it has.
        others: Weights of more than one dimension that are kept in another type, by name.
        passed_over: Settings in the file that transformers by itself does not read; llama.cpp and `model:` do.
    """

    path: Path
    kind: GgufType
    num_tensors: int
    others: dict[str, GgufType]
    passed_over: list[str]


def write_gguf(
    model: PreTrainedModel, file: Path, kind: GgufType, name: str, add_vocabulary: Callable[[GGUFWriter], None]
) -> GgufFile:
    """Write a model as a GGUF file, which is on the disk when this returns.

    Args:
        model: The model, which `gguf_problem` finds nothing wrong with.
        file: Where to; its folder exists.
        kind: The type of its weights.
        name: What the file calls the model.
        add_vocabulary: Adds the keys of the tokenizer.

    Raises:
        UserError: A weight has no place in the file or cannot be held in the type, or the disk refuses.
    """
    gguf_package("writing", str(file))
    planned = FileTensors(model, kind)
    header = Header.of(model.config, planned.architecture, name, kind)
    passed_over = read_back(model.config, header, planned.tensors)
    writer = header.writer()
    add_provenance(writer, origin_of(model).provenance)
    add_vocabulary(writer)
    for tensor in planned.tensors:
        _announce(writer, tensor)
    with disk_refusals("writing the GGUF file", file):
        _write(writer, file, planned)
    _check(file, planned.tensors)
    others = {one.name: one.kind for one in planned.tensors if len(one.shape) > 1 and one.kind != kind}
    _warn(others, passed_over)
    return GgufFile(file, kind, len(planned.tensors), others, passed_over)


def _warn(others: Mapping[str, GgufType], passed_over: list[str]) -> None:
    """Say what is otherwise in the file than was asked for, and what not all programs read of it."""
    if wide := [name for name, kind in others.items() if kind == "f16"]:
        rows = "whose rows are no multiple of 32 numbers long"
        _log.warning("%s %s, kept in f16: %s", several(len(wide), "weight", "weights"), rows, shown(wide))
    if passed_over:
        names = ", ".join(passed_over)
        _log.warning("`from_pretrained(gguf_file=…)` of transformers does not read %s; dpo and llama.cpp do", names)


def _announce(writer: GGUFWriter, tensor: Written) -> None:
    """Add a tensor to the list in front of the file; the contents follow that list."""
    import gguf
    import numpy as np

    ggml = gguf.GGMLQuantizationType[tensor.kind.upper()]
    numbers, size = gguf.GGML_QUANT_SIZES[ggml]
    num_bytes = int(np.prod(tensor.shape)) // numbers * size
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=ggml)


def _write(writer: GGUFWriter, file: Path, planned: FileTensors) -> None:
    """Write all, and flush it to the disk."""
    writer.open_output_file(file)
    with cast("list[BinaryIO]", writer.fout)[0] as opened:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(opened, opened.tell())
        write_flushing(opened, _content(planned.tensors, writer.data_alignment))
        opened.flush()
        os.fsync(opened.fileno())


def _content(tensors: list[Written], alignment: int) -> Iterator[memoryview]:
    """Yield what follows the header: each tensor, filled up to where the next one may begin."""
    for tensor in tensors:
        weights, size = tensor.take(), 0
        check_range(weights, tensor.kind, tensor.name)
        for part in encoded(weights, tensor.kind):
            size += part.nbytes
            yield memoryview(part.tobytes())
        yield memoryview(bytes(-size % alignment))


def _check(file: Path, tensors: list[Written]) -> None:
    """Compare names, shapes and types in the file with what was to be written.

    Raises:
        UserError: They are others.
    """
    from dpo_cli.modeling.gguf.reader import Reader

    found = {
        one.name: (tuple(reversed(one.shape.tolist())), one.tensor_type.name.lower()) for one in Reader(file).tensors
    }
    if found != {one.name: (one.shape, one.kind) for one in tensors}:
        hint = "check the disk, then export again"
        raise UserError("the GGUF file does not hold what was written", str(file), hint, status=FAILED)
