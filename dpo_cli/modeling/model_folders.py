"""What a model's name stands for: a folder, a GGUF file's converted folder, or what the Hub's cache holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dpo_cli.modeling.gguf_conversion import converted
from dpo_cli.modeling.hub import fetched
from dpo_cli.modeling.model_files import Trust
from dpo_cli.modeling.model_names import check_model, whole_model
from dpo_cli.modeling.refusals import explained

_T = TypeVar("_T")


def load_named(name: str, kind: str, load: Callable[[str], _T], trust: Trust) -> _T:
    """Call a loader on the folder that a name stands for; that of an adapter is its base's."""
    if problem := check_model(name, trust=trust):
        raise problem
    whole = whole_model(name)
    folder = _folder_of(whole)
    with explained(name, kind):
        return load(str(folder if Path(folder).is_dir() else fetched(whole)))


def _folder_of(name: str) -> Path | str:
    """Return what transformers loads for a name: the name, or the folder that a GGUF file was converted to."""
    path = Path(name)
    return converted(path) if path.suffix.lower() == ".gguf" else name
