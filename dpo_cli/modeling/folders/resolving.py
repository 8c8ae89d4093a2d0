"""What a model's name stands for: a folder, a GGUF file's converted folder, or what the Hub's cache holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dpo_cli.modeling.folders.hub import fetched
from dpo_cli.modeling.folders.model_files import Trust
from dpo_cli.modeling.folders.model_names import check_model, is_gguf, whole_model
from dpo_cli.modeling.folders.refusals import explained

_T = TypeVar("_T")


def load_named(name: str, kind: str, load: Callable[[str], _T], trust: Trust, *, weights: bool = False) -> _T:
    """Call a loader on the folder that a name stands for; that of an adapter is its base's.

    Args:
        name: The model.
        kind: What of it is loaded, in a word.
        load: The loader.
        trust: What the model may bring along.
        weights: Whether the loader reads weights: a GGUF file's folder has them only then.
    """
    if problem := check_model(name, trust=trust):
        raise problem
    whole = whole_model(name)
    folder = _folder_of(whole, weights=weights)
    with explained(name, kind):
        return load(str(folder if Path(folder).is_dir() else fetched(whole)))


def _folder_of(name: str, *, weights: bool) -> Path | str:
    """Return what transformers loads for a name: the name, or a folder that was made of a GGUF file."""
    if not is_gguf(name):
        return name
    # It loads models, which takes seconds to import: a tokenizer alone is there without.
    from dpo_cli.modeling.gguf.conversion import converted, settings_of

    return converted(Path(name)) if weights else settings_of(Path(name))
