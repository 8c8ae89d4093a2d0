"""Tensors that are sharded over processes, in files: each process writes the rows that it has, any rows are read again.

    shards.json                             of every tensor its shape and type, and which rows of it are in which file
    weights-00001-of-00002.safetensors      what the first of two processes has of the weights
    optimizer-00001-of-00002.safetensors    and of the optimizer's state

Rows are those of dimension 0. What is not sharded, a single number say, is in one file as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dpo_cli.modeling.folders.model_files import SHARDS, WEIGHTS
from dpo_cli.modeling.folders.streams import DTYPES, NAMES, save_tensors
from dpo_cli.modeling.split import whole_dtype, whole_value
from dpo_cli.system.storage import DamagedFolder, flushed_digest, write_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The rows that this process has of a tensor.

    Attributes:
        tensor: The tensor, whole or sharded; it may go on changing.
        first: The index of the first row in the whole.
        shape: The shape of the whole.
        rows: The shape of what is here.
        written_here: Whether this process is the one that writes them.
    """

    tensor: Tensor
    first: int
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    written_here: bool

    @classmethod
    def of(cls, tensor: Tensor, *, is_main: bool) -> Piece:
        """Look at what is here of a tensor.

        Args:
            tensor: Split among processes on dimension 0, or whole in each of them.
            is_main: Whether this is the process that writes whole ones.
        """
        if not isinstance(tensor, DTensor):
            return cls(tensor, 0, tuple(tensor.shape), tuple(tensor.shape), is_main)
        rows, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        place = tensor.device_mesh.get_coordinate() or ()
        copies = [at for at, how in zip(place, tensor.placements, strict=True) if isinstance(how, Replicate)]
        return cls(tensor, offset[0] if offset else 0, tuple(tensor.shape), tuple(rows), not any(copies))

    @property
    def dtype(self) -> torch.dtype:
        """The type of its content."""
        return whole_dtype(self.tensor)

    def content(self) -> Tensor:
        """Return what is here, merged where it is held in two halves."""
        return whole_value(self.tensor)

    def copied(self) -> Piece:
        """Return the same in memory of its own, on the host."""
        return replace(self, tensor=self.content().to("cpu", copy=True))


def sharded_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of this process as a tensor that is sharded as another of the same shape is."""
    if not isinstance(tensor, DTensor):
        return rows
    return DTensor.from_local(
        rows.contiguous(), tensor.device_mesh, tensor.placements, run_check=False,
        shape=tensor.shape, stride=torch.empty(tensor.shape, device="meta").stride(),
    )  # fmt: skip


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a tensor; where it is sharded, every process has to ask for it at the same time."""
    if not isinstance(tensor, DTensor):
        return whole_value(tensor)
    sharded: Any = sharded_like(tensor, whole_value(tensor))
    whole: Tensor = sharded.full_tensor()
    return whole


@dataclass(frozen=True)
class Part:
    """A file that a process has written.

    Attributes:
        kind: What it has tensors of.
        file: Its name.
        num_bytes: Its size.
        digest: The SHA-256 of its bytes, in hex.
        tensors: By name: type and shape of the whole, and the rows that are in the file.
    """

    kind: str
    file: str
    num_bytes: int
    digest: str
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def write_part(folder: Path, kind: str, pieces: Mapping[str, Piece], rank: int, num_ranks: int) -> Part | None:
    """Write the rows that this process has, where it has any to write, and make sure that they are on the disk.

    Args:
        folder: Where to.
        kind: What the tensors are: weights, say.
        pieces: By name.
        rank: This process.
        num_ranks: How many there are.
    """
    mine = {name: one for name, one in pieces.items() if one.written_here and (not one.rows or one.rows[0])}
    if not mine:
        return None
    path = folder / f"{kind}-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"
    sketch = {name: torch.empty(one.rows, dtype=one.dtype, device="meta") for name, one in mine.items()}
    save_tensors(sketch, path, lambda name: mine[name].content(), {"format": "pt"}, unlike_pickle=True)
    digest = flushed_digest(path)
    tensors = {
        name: (NAMES[one.dtype], one.shape, one.first, one.first + (one.rows[0] if one.rows else 1))
        for name, one in mine.items()
    }
    return Part(kind, path.name, path.stat().st_size, digest, tensors)


class _Tensor(BaseModel):
    """What shards.json says of a tensor: its type and shape, and file, first row and end of every part."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: str
    shape: list[int]
    parts: list[tuple[str, int, int]]

    def check(self, name: str) -> None:
        """Compare the parts with the shape.

        Raises:
            DamagedFolder: There are rows in none of them, or in several.
        """
        ends = [0, *(end for _, _, end in self.parts)]
        whole = self.shape[0] if self.shape else 1
        follows = all(first == before for (_, first, _), before in zip(self.parts, ends, strict=False))
        inside = all(Path(file).name == file for file, _, _ in self.parts)
        if self.dtype not in DTYPES or not follows or ends[-1] != whole or not inside:
            raise DamagedFolder(f"{SHARDS} does not say where all rows of `{name}` are")


class _Shards(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    processes: int
    tensors: dict[str, dict[str, _Tensor]]


def write_list(folder: Path, parts: Iterable[Part], num_ranks: int) -> None:
    """Write down what all processes have written where."""
    found: dict[str, dict[str, _Tensor]] = {}
    for part in parts:
        for name, (dtype, shape, first, end) in part.tensors.items():
            tensors = found.setdefault(part.kind, {})
            tensor = tensors.setdefault(name, _Tensor(dtype=dtype, shape=list(shape), parts=[]))
            tensor.parts.append((part.file, first, end))
    for tensors in found.values():
        for name, tensor in tensors.items():
            tensor.parts.sort(key=lambda part: part[1])
            tensor.check(name)
    write_text(folder / SHARDS, _Shards(processes=num_ranks, tensors=found).model_dump_json() + "\n")


class Shards:
    """What processes have written of tensors, read by rows; nothing is read that is not asked for.

    Attributes:
        processes: How many there were.
    """

    def __init__(self, folder: Path, tensors: dict[str, dict[str, _Tensor]], processes: int) -> None:
        self.processes = processes
        self._folder, self._tensors, self._files = folder, tensors, dict[str, Any]()

    @classmethod
    def in_folder(cls, folder: Path) -> Shards:
        """Return what is in a folder of shards.

        Raises:
            DamagedFolder: `shards.json` is not what was written there.
        """
        try:
            found = _Shards.model_validate_json((folder / SHARDS).read_bytes())
        except OSError as error:
            raise DamagedFolder(f"{SHARDS} cannot be read: {error.strerror}") from None
        except ValidationError:
            raise DamagedFolder(f"{SHARDS} is not a list of shards") from None
        for tensors in found.tensors.values():
            for name, tensor in tensors.items():
                tensor.check(name)
        return cls(folder, found.tensors, found.processes)

    @classmethod
    def in_file(cls, file: Path, kind: str) -> Shards:
        """Return what one process has written of all tensors of a kind, into one file."""
        tensors = {}
        with safe_open(file, framework="pt", backend="pread") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                found = opened.get_slice(name)
                shape = found.get_shape()
                parts = [(file.name, 0, shape[0] if shape else 1)]
                tensors[name] = _Tensor(dtype=found.get_dtype(), shape=shape, parts=parts)
        return cls(file.parent, {kind: tensors}, 1)

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Tell whether a folder has a list of shards."""
        return (folder / SHARDS).is_file()

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of a kind, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.get(kind, {}).items()}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return DTYPES[self._tensors[kind][name].dtype]

    def parts(self, kind: str, name: str) -> list[tuple[int, int]]:
        """Return first row and end of every part that a tensor was written in."""
        return [(first, end) for _, first, end in self._tensors[kind][name].parts]

    def whole(self, kind: str, name: str) -> Tensor:
        """Return all of a tensor."""
        shape = self._tensors[kind][name].shape
        return self.rows(kind, name, 0, shape[0] if shape else 1)

    def rows(self, kind: str, name: str, first: int, end: int) -> Tensor:
        """Return rows of a tensor, from whatever files they are in; of one without dimensions that itself."""
        tensor = self._tensors[kind][name]
        found = [
            self._read(file, name, max(first, start) - start, min(end, stop) - start, stop - start, tensor.shape)
            for file, start, stop in tensor.parts
            if max(first, start) < min(end, stop)
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            return torch.empty(0, *tensor.shape[1:], dtype=DTYPES[tensor.dtype])
        return torch.cat(found)

    def _read(self, file: str, name: str, first: int, end: int, num_rows: int, shape: list[int]) -> Tensor:
        """Return rows of what one file has of a tensor.

        Raises:
            DamagedFolder: It has something else.
        """
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt", backend="pread")
        opened = self._files[file]
        there = opened.get_slice(name).get_shape()
        if there != ([num_rows, *shape[1:]] if shape else []):
            raise DamagedFolder(f"`{name}` has the shape {there} in {file}, which is not the one in {SHARDS}")
        # Of all that a file has, a slice takes the memory twice.
        whole = not shape or (first, end) == (0, num_rows)
        found: Tensor = opened.get_tensor(name) if whole else opened.get_slice(name)[first:end]
        return found

    def slices(self, kind: str) -> dict[str, ShardedSlice]:
        """Return all tensors of a kind, to be read when they are asked for, as those of a safetensors file are."""
        return {name: ShardedSlice(self, kind, name) for name in self._tensors.get(kind, {})}


@dataclass(frozen=True)
class ShardedSlice:
    """A tensor that is read where it is indexed, by rows or, with `...`, as a whole.

    Attributes:
        shards: Where it is.
        kind: What it is one of.
        name: Its name.
    """

    shards: Shards
    kind: str
    name: str

    def get_shape(self) -> list[int]:
        """Return the shape of the whole."""
        return list(self.shards.shapes(self.kind)[self.name])

    def get_dtype(self) -> str:
        """Return the type, as safetensors calls it."""
        return NAMES[self.shards.dtype(self.kind, self.name)]

    def __getitem__(self, index: Any) -> Tensor:
        rows = index[0] if isinstance(index, tuple) else index
        if isinstance(rows, slice) and rows.step in (None, 1) and (shape := self.get_shape()):
            first, end, _ = rows.indices(shape[0])
            found = self.shards.rows(self.kind, self.name, first, max(first, end))
            return found[(slice(None), *index[1:])] if isinstance(index, tuple) else found
        whole = self.shards.whole(self.kind, self.name)
        return whole if index is Ellipsis else whole[index]


def slices_of_weights(folder: Path) -> dict[str, ShardedSlice]:
    """Return the weights in a folder of shards by name, to be read when they are asked for."""
    return Shards.in_folder(folder).slices(WEIGHTS)
