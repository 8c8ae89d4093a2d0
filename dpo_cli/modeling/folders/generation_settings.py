"""What a saved model says of generation: valid in transformers, and with every token that ends a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import __version__

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_COMPLAINT = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""How transformers names, in its error, each setting that has no effect beside the others."""

_NOT_KEPT = "_from_model_config"
"""It makes older versions of transformers read the settings from config.json instead."""


def take_over(model: PreTrainedModel, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a model the generation settings of a file, if there is one, without those that transformers ignores.

    Args:
        model: Its own settings are replaced; without a file they stay.
        file: A `generation_config.json`.

    Returns:
        What is to be saved, what transformers does not know included, and what was left out with its value.

    Raises:
        ValueError: The file is not valid.
    """
    if not model.can_generate():
        return {}, {}
    said: dict[str, Any] = {}
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        # A model that was built without its weights has those of its config.json.
        model.generation_config = type(model.generation_config).from_pretrained(str(file.parent))
    settings = model.generation_config
    left_out = {name: getattr(settings, name) for name in ignored(settings)}
    for name in left_out:
        setattr(settings, name, None)
    kept = {name: value for name, value in said.items() if name not in left_out}
    return {**kept, **settings.to_diff_dict()}, left_out


def ignored(settings: GenerationConfig) -> list[str]:
    """Name the settings that have no effect beside the others, with which transformers refuses to save them."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return _COMPLAINT.findall(str(error))
    return []


def complete(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return generation settings that end where the tokenizer ends texts too, and name a token to pad with."""
    found = {name: value for name, value in settings.items() if name != _NOT_KEPT}
    if tokenizer.eos_token_id is not None:
        found["eos_token_id"] = with_ends(found.get("eos_token_id"), [tokenizer.eos_token_id])
    if found.get("pad_token_id") is None:
        ends = found.get("eos_token_id")
        first = ends[0] if isinstance(ends, list) else ends
        found["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first
    return {**found, "transformers_version": __version__}


def with_ends(known: int | list[int] | None, tokens: Iterable[int]) -> int | list[int] | None:
    """Return the tokens that end texts with some more, those first; as they were if they had them all."""
    listed = known if isinstance(known, list) else [known]
    held = [token for token in listed if token is not None]
    if not (new := [token for token in tokens if token not in held]):
        return known
    return [*new, *held] if len(new) + len(held) > 1 else new[0]
