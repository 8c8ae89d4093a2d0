"""A model becomes a GGUF file: what it is, its vocabulary, and its tensors, each of which is in memory once more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.folders.saving import disk_refusals, origin_of
from dpo_cli.modeling.gguf.about import add_provenance
from dpo_cli.modeling.gguf.architectures import Architecture
from dpo_cli.modeling.gguf.package import gguf_package
from dpo_cli.modeling.gguf.positions import written_positions
from dpo_cli.modeling.gguf.tensors import FileTensors, Written
from dpo_cli.modeling.gguf.types import GgufType, check_range, encoded
from dpo_cli.system.storage import write_flushing

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedModel

_FLOATS = ("epsilon", "softcapping", "freq_base", "freq_base_swa", "scaling.factor", "beta_fast", "beta_slow", "scale")
"""How keys end whose numbers are floats, also where they are whole."""


@dataclass(frozen=True)
class GgufFile:
    """What was written.

    Attributes:
        path: The file.
        kind: The type that its weights are kept in.
        num_tensors: How many tensors it has.
        others: Weights of more than one dimension that are kept in another type, by name.
    """

    path: Path
    kind: GgufType
    num_tensors: int
    others: dict[str, GgufType]


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
    gguf = gguf_package("writing", str(file))
    planned = FileTensors(model, kind)
    writer = gguf.GGUFWriter(None, planned.architecture.name)
    _add_about(writer, name, kind)
    add_provenance(writer, origin_of(model).provenance)
    for key, value in _settings(model.config, planned.architecture).items():
        _add(writer, f"{planned.architecture.name}.{key}", value)
    add_vocabulary(writer)
    for tensor in planned.tensors:
        _announce(writer, tensor)
    with disk_refusals("writing the GGUF file", file):
        _write(writer, file, planned)
    _check(file, planned.tensors)
    others = {one.name: one.kind for one in planned.tensors if len(one.shape) > 1 and one.kind != kind}
    return GgufFile(file, kind, len(planned.tensors), others)


def _add_about(writer: GGUFWriter, name: str, kind: GgufType) -> None:
    """Add what the file says of itself."""
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _settings(config: PretrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """Return what the file says of the model, by key."""
    said = {key: getattr(config, name, None) for key, name in architecture.settings.items()}
    said |= {key: value(config) if callable(value) else value for key, value in architecture.constants.items()}
    if architecture.rotary:
        said |= {f"rope.{key}": value for key, value in written_positions(config)[0].items()}
    return {key: value for key, value in said.items() if value is not None}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key of the kind of number that readers look for."""
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float) or key.endswith(_FLOATS):
        writer.add_float32(key, float(value))
    else:
        writer.add_uint32(key, value)


def _announce(writer: GGUFWriter, tensor: Written) -> None:
    """Tell of a tensor, of which the content follows when all have been told of."""
    import gguf
    import numpy as np

    ggml = gguf.GGMLQuantizationType[tensor.kind.upper()]
    numbers, size = gguf.GGML_QUANT_SIZES[ggml]
    num_bytes = int(np.prod(tensor.shape)) // numbers * size
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=ggml)


def _write(writer: GGUFWriter, file: Path, planned: FileTensors) -> None:
    """Write all, and flush it to the disk."""
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        opened = cast("list[BinaryIO]", writer.fout)[0]
        writer.write_padding(opened, opened.tell())
        write_flushing(opened, _content(planned.tensors, writer.data_alignment))
        opened.flush()
        os.fsync(opened.fileno())
    finally:
        writer.close()


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
    import gguf

    found = {
        one.name: (tuple(reversed(one.shape.tolist())), one.tensor_type.name.lower())
        for one in gguf.GGUFReader(file).tensors
    }
    if found != {one.name: (one.shape, one.kind) for one in tensors}:
        raise UserError("the GGUF file does not hold what was written", str(file), None, status=FAILED)
