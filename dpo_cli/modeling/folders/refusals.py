"""What libraries raise for a model, in words: the value in its config.json that is wrong, and what changes it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging as hf_logging

from dpo_cli.errors import UserError
from dpo_cli.modeling.broken_off import is_broken_off
from dpo_cli.modeling.folders.model_files import CONFIG, GENERATION, all_settings
from dpo_cli.modeling.out_of_memory import is_out_of_memory
from dpo_cli.settings import located

_DAMAGED = re.compile(r"JSON|deserializ|header|line \d+ column \d+|can't decode|no file named|GGUF|mmap|os error")
"""How libraries speak of files that they cannot read to the end, among words that settings may have as well."""

_OTHER_NAMES = {
    r"padding_idx": "pad_token_id",
    r"FlashAttention\w*": "attn_implementation",
    r"number of attention heads": "num_attention_heads",
}
"""How they call a setting by another name."""

_SHORTEST_VALUE = 3
_SHOWN = 3


@contextlib.contextmanager
def explained(name: str, kind: str) -> Iterator[None]:
    """Silence the libraries' bars and reports, and turn what they raise for bad input into a `UserError`."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except UserError as error:
        error.where = error.where or name
        raise
    except pickle.UnpicklingError as error:
        what = f"the {kind} cannot be loaded: its pickled weights hold more than tensors, or are damaged"
        hint = "nothing pickled is executed: choose a model whose weights are in .safetensors files"
        raise UserError(what, name, hint) from error
    except Exception as error:
        if is_out_of_memory(error) or is_broken_off(error):
            raise
        # What they raise for a broken folder is of every kind, and none of it is ours: only their calls stand inside.
        path = Path(name)
        # Of a Hub id nothing is here yet, or nothing was wrong with it.
        reason, hint = reason_and_hint(error, name, path if path.exists() else None)
        raise UserError(f"the {kind} cannot be loaded: {reason}", name, hint) from error
    finally:
        hf_logging.set_verbosity(level)


def reason_and_hint(error: Exception, name: str, folder: Path | None) -> tuple[str, str]:
    """Put into words what a library raised for a model, and what to do about it.

    Args:
        error: What it raised.
        name: What the user called the model.
        folder: Where its files are; None: nowhere on this disk.
    """
    reason = _reason(error)
    if "custom code" in reason:
        hint = "such code is never run unless `model.trust_remote_code` is true; read it before you allow it"
        return "it has its own code", hint
    if reason.startswith("Unrecognized configuration class"):
        named = re.search(r"(\w+)Config'", reason)
        return f"{named[1] if named else 'it'} is not a causal language model", "choose a model that continues text"
    if "not supported yet" in reason:
        return reason, "choose another model, or update transformers if the model is newer"
    if folder is None:
        return (
            reason,
            f"there is no folder {located(name)}; a Hub id needs the network, unless it is in the Hub's cache",
        )
    found = [] if _DAMAGED.search(reason) else _named(reason, folder)[:_SHOWN]
    if not found:
        return reason, "the model is incomplete or damaged: save or download it again"
    file, version = found[0][0], importlib.metadata.version("transformers")
    said = ", ".join(f"`{setting}: {json.dumps(value)}`" for _, setting, value in found)
    hint = f"correct {file}; or update transformers ({version} is installed) if the model is newer"
    if any(setting.endswith("attn_implementation") for _, setting, _ in found):
        hint = "set `model.attention` to `eager` or `sdpa`, which need no other package"
    return f"{file} says {said}: {reason}", hint


def _reason(error: Exception) -> str:
    """Return the first line of what was raised that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":") and lines[1:]:
        # The validation of settings says in the second line what is wrong.
        return re.sub(r"^\w*(Error|Exception): ", "", lines[1])
    if isinstance(error, KeyError) and lines and " " not in lines[0]:
        return f"{lines[0]} is unknown"
    return lines[0] if lines else type(error).__name__


def _named(reason: str, folder: Path) -> list[tuple[str, str, Any]]:
    """Return the settings of a model, each with its file, that a reason names or whose values it quotes."""
    for other, ours in _OTHER_NAMES.items():
        reason = re.sub(other, ours, reason, flags=re.IGNORECASE)
    for file in (CONFIG, GENERATION):
        try:
            settings = list(all_settings(json.loads((folder / file).read_text(encoding="utf-8"))))
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        found = [(file, setting, value) for setting, value in settings if _speaks_of(reason, setting, value)]
        if found:
            return found
    return []


def _speaks_of(reason: str, setting: str, value: Any) -> bool:
    """Tell whether a reason is about a setting, by its name or its value."""
    if isinstance(value, str) and (f"'{value}'" in reason or (len(value) >= _SHORTEST_VALUE and _word(value, reason))):
        return True
    if type(value) is int and value == 0 and "zero" in reason:
        return True
    return not isinstance(value, dict) and _word(setting.lstrip("_"), reason)


def _word(text: str, reason: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reason) is not None
