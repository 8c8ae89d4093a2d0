"""What `dpo export` can write, by the options of the command line: a model folder, an adapter, or a GGUF file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from dpo_cli.config.export_sources import Source, TrainedModel
from dpo_cli.errors import UserError
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.folders.model_files import CONFIG
from dpo_cli.modeling.gguf.architectures import gguf_problem
from dpo_cli.modeling.gguf.types import GGUF_TYPES, GgufType
from dpo_cli.modeling.held import Dtype
from dpo_cli.system.hub import cached_file, is_hub_id

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that transformers reads.

    Attributes:
        dtype: The dtype of its weights; None: those of the source's own files, or of its base's.
        largest_bytes: The most bytes of a file of its weights; None: as `final/` has.
    """

    dtype: Dtype | None = None
    largest_bytes: int | None = None


@dataclass(frozen=True)
class PeftFolder:
    """An adapter by itself, in a folder that PEFT reads."""


@dataclass(frozen=True)
class GgufFolder:
    """A folder with a GGUF file, which llama.cpp and Ollama read.

    Attributes:
        kind: The type of its weights.
    """

    kind: GgufType


Form = ModelFolder | PeftFolder | GgufFolder
"""The closed union of all that is written."""


@dataclass(frozen=True)
class Options:
    """What the command line says of an export beside source and target, as it says it.

    Attributes:
        merge: Whether an adapter becomes part of its base.
        dtype: The dtype of the weights that are written; None: as they are.
        max_shard_size: The largest file of weights; None: 5 GB.
        gguf: The type of the weights in a GGUF file; None: a folder is written.
    """

    merge: bool = False
    dtype: str | None = None
    max_shard_size: str | None = None
    gguf: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that are given."""
        values = {
            "--merge": self.merge,
            "--dtype": self.dtype,
            "--max-shard-size": self.max_shard_size,
            "--gguf": self.gguf,
        }
        return [option for option, value in values.items() if value]


def find_form(source: Source, options: Options) -> tuple[Form, list[UserError]]:
    """Return how something is written, and which options are wrong or have no effect."""
    problems = []
    if options.dtype not in (None, *get_args(Dtype)):
        hint = f"choose one of {', '.join(get_args(Dtype))}"
        problems.append(UserError(f"`{options.dtype}` is not a dtype that weights are written in", "--dtype", hint))
    if options.merge and not source.is_adapter:
        what = f"`{source.name}` is a whole model: it has no adapter to merge"
        problems.append(UserError(what, "--merge", "leave `--merge` out"))
    largest, wrong = _largest_bytes(options.max_shard_size)
    problems += wrong
    if options.gguf is not None:
        problems += [*_without_effect(options, "a GGUF file, whose type `--gguf` names", "leave it out")]
        return _gguf_form(source, options, problems)
    if not source.is_adapter or options.merge:
        return ModelFolder(cast(Dtype | None, options.dtype), largest), problems
    on = "an adapter, whose weights are written in float32, in a single file"
    return PeftFolder(), [*problems, *_without_effect(options, on, "add `--merge`, or leave it out")]


def _without_effect(options: Options, on: str, hint: str) -> Iterator[UserError]:
    """Yield the options that have no effect on a form."""
    for option, value in (("--dtype", options.dtype), ("--max-shard-size", options.max_shard_size)):
        if value is not None:
            yield UserError(f"`{option}` has no effect on {on}", option, hint)


def _gguf_form(source: Source, options: Options, problems: list[UserError]) -> tuple[Form, list[UserError]]:
    """Return the form of a GGUF file, and what is wrong with it beside some problems that are known."""
    kind = str(options.gguf).lower()
    if kind not in GGUF_TYPES:
        what = f"`{options.gguf}` is not a type that weights are written in as GGUF"
        problems.append(UserError(what, "--gguf", f"choose one of {', '.join(GGUF_TYPES)}"))
        kind = GGUF_TYPES[0]
    if source.is_adapter and not options.merge:
        what = "an adapter by itself is not written as GGUF"
        problems.append(UserError(what, "--gguf", "add `--merge`, which makes one model of it and its base"))
    if missing := missing_package("gguf", "gguf", "--gguf"):
        problems.append(missing)
    if problem := _gguf_problem(source):
        hint = "export it as a model folder, without `--gguf`"
        problems.append(UserError(problem, "--gguf", hint))
    return GgufFolder(kind), problems


def _gguf_problem(source: Source) -> str | None:
    """Say why there is no GGUF of an architecture, where its settings are here; the rest is left until it is loaded."""
    if isinstance(source, TrainedModel):
        file: Path | None = source.folder / CONFIG
    else:
        name = source.config.model.name
        file = cached_file(name, CONFIG) if is_hub_id(name) else Path(name) / CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    return gguf_problem(said) if isinstance(said, dict) else None


def _largest_bytes(size: str | None) -> tuple[int | None, list[UserError]]:
    """Return the largest file of weights, and what is wrong with how it is written."""
    if size is None:
        return None, []
    found = _SIZE.fullmatch(size.strip())
    base = 1024 if found and found[3] else 1000
    size_bytes = float(found[1]) * base ** (1 + "KMGT".index(found[2].upper())) if found else 0.0
    if 1 <= size_bytes < math.inf:
        return int(size_bytes), []
    hint = "write a number and a unit, as in `500MB`, `5GB` or `2GiB`"
    return None, [UserError(f"`{size}` is not a size of a file", "--max-shard-size", hint)]
