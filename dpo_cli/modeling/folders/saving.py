"""A model becomes a folder again: what training moved, and all else as it was in the folder that it came from."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.folders.completeness import check_complete, configs
from dpo_cli.modeling.folders.generation_settings import complete, take_over, with_ends
from dpo_cli.modeling.folders.identities import Stamp
from dpo_cli.modeling.folders.model_files import (
    CONFIG,
    GENERATION,
    MOST_TEXT_BYTES,
    Trust,
    holds_tokenizer,
)
from dpo_cli.modeling.folders.provenance import Provenance, provenance_of
from dpo_cli.modeling.folders.refusals import reason_and_hint
from dpo_cli.modeling.folders.saved_weights import SavedWeights
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.system.storage import refused, sealed_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_LOGITS_ALONE = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""What a model's settings ask for beside its logits, and what they say where they ask for nothing."""

_OF_TOKENIZERS = re.compile(
    r"tokenizer(_config)?\.json|(special_tokens_map|added_tokens|tekken)\.json"
    r"|vocab\.(json|txt|bpe)|merges\.txt|.+\.(model|tiktoken|spm)|tokenizer\.model\..+",
    re.IGNORECASE,
)
"""Files of a tokenizer, which training does not change."""

_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use_policy)[\w.-]*", re.IGNORECASE)
"""Files that say what may be done with a model."""

_BELONGS = re.compile(
    rf"{_OF_TOKENIZERS.pattern}|(\w+_)?(pre)?processor_config\.json|{_LICENCE.pattern}", re.IGNORECASE
)
"""Files of a model that training does not change: of tokenizer and processors, and the licence."""

_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Origin:
    """What a model's folder held that what is saved holds again.

    Attributes:
        asked: What its settings asked for beside the logits, by the name of the model within; the whole is "".
        files: The files that belong to it, by name.
        generation: What it says of generation, what transformers does not know included.
        ignored: What else it says of generation, which transformers ignores and refuses to save.
        types: The types of its weights.
        provenance: Where it comes from.
        read_from: The folder or file that its weights were read from; None: it is not known.
        stamp: The stamp of that before they were read.
    """

    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, Any] = field(default_factory=dict)
    types: WeightTypes = field(default_factory=lambda: WeightTypes({}, torch.float32))
    provenance: Provenance = field(default_factory=Provenance)
    read_from: Path | None = None
    stamp: Stamp = field(default_factory=dict)


def origin_of(model: PreTrainedModel) -> Origin:
    """Return what `remember` kept with a model; of one that was made here, nothing."""
    found: Origin = getattr(model, "origin", Origin())
    return found


def remember(
    model: PreTrainedModel,
    folder: Path,
    trust: Trust,
    types: WeightTypes,
    source: Path | None = None,
    stamp: Stamp | None = None,
) -> None:
    """Keep with a model what its folder holds beside weights, since the folder may be gone when the model is saved.

    Args:
        model: The model.
        folder: Where it came from.
        trust: Python files belong to a model that is trusted with them.
        types: The types of its weights there.
        source: The folder or file that its weights are read from; None: it is not known.
        stamp: The stamp of that before they are read.
    """
    files = _files(
        folder, lambda path: bool(_BELONGS.fullmatch(path.name)) or (trust.remote_code and path.suffix == ".py")
    )
    generation, ignored = take_over(model, folder / GENERATION)
    asked, provenance = logits_alone(model), provenance_of(folder)
    model.origin = Origin(asked, files, generation, ignored, types, provenance, source, stamp or {})


def remember_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Keep with a model the tokenizer and the generation settings of an adapter in place of its own, if it has them."""
    origin: Origin = model.origin
    if holds_tokenizer(folder):
        others = {name: content for name, content in origin.files.items() if not _OF_TOKENIZERS.fullmatch(name)}
        files = _files(folder, lambda path: bool(_OF_TOKENIZERS.fullmatch(path.name)))
        origin = replace(origin, files=others | files)
    if (folder / GENERATION).is_file():
        generation, ignored = take_over(model, folder / GENERATION)
        origin = replace(origin, generation=generation, ignored=ignored)
    model.origin = origin


def remember_provenance(model: PreTrainedModel, known: Provenance) -> None:
    """Keep with a model where it comes from, where more is known of that than its folder tells."""
    model.origin = replace(origin_of(model), provenance=known)


def end_at(model: PreTrainedModel, token: int) -> None:
    """Let generation end at a token too, by all settings that are saved with a model; others that end it stay."""
    end_generation_at(model, [token])
    model.config.eos_token_id = with_ends(getattr(model.config, "eos_token_id", None), [token])


def end_generation_at(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    """Let generation end at some tokens too, now and by the settings that are saved with a model."""
    if model.can_generate():
        ends = with_ends(model.generation_config.eos_token_id, tokens)
        model.generation_config.eos_token_id = ends
        origin = origin_of(model)
        model.origin = replace(origin, generation={**origin.generation, "eos_token_id": ends})


def _files(folder: Path, belongs: Callable[[Path], bool]) -> dict[str, bytes]:
    """Return the content of some files of a folder, by name, unless they are too large for what they are."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if belongs(path) and path.is_file() and path.stat().st_size <= MOST_TEXT_BYTES
    }


def logits_alone(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Switch off what a model's settings ask for beside its logits; return what that was."""
    asked: dict[str, dict[str, Any]] = {}
    for name, config in configs(model):
        for setting, off in _LOGITS_ALONE.items():
            if (value := getattr(config, setting, off)) != off:
                asked.setdefault(name, {})[setting] = value
                setattr(config, setting, off)
    return asked


@contextlib.contextmanager
def saved_folder(
    target: Path, doing: str, details: dict[str, Any] | None = None, *, waits: bool = False, replaces: bool = True
) -> Iterator[Path]:
    """Yield a folder to write into, which appears as `target`, sealed, when all of it is written.

    Args:
        target: The folder to appear.
        doing: What failed, where it fails.
        details: What its manifest says beside sizes and digests.
        waits: Whether filling it waits for other processes.
        replaces: Whether an older `target` is replaced.

    Raises:
        UserError: The disk refuses, or there is a `target` that must not be replaced. `target` is as it was then.
    """
    # They may be filled until the folder is left.
    details = {} if details is None else details
    with disk_refusals(doing, target), sealed_folder(target, details, waits=waits, replaces=replaces) as temporary:
        yield temporary


@contextlib.contextmanager
def disk_refusals(doing: str, target: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `UserError`, also where a library raises it as an error of its own.

    Args:
        doing: What failed, where it fails.
        target: What is written.

    Raises:
        UserError: The disk refuses.
    """
    try:
        yield
    except OSError as error:
        raise refused(error, doing, target) from error
    except Exception as error:
        if (refusal := _os_error(error)) is None:
            raise
        raise refused(refusal, doing, target) from error


@contextlib.contextmanager
def saved_model(target: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, doing: str) -> Iterator[Path]:
    """Write model and tokenizer as a sealed Hugging Face folder, as `saved_folder` does, and yield it."""
    with saved_folder(target, doing) as temporary:
        write_model(temporary, model, tokenizer)
        yield temporary


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: SavedWeights | None = None,
) -> None:
    """Write model and tokenizer into a folder, so that what opened the model before opens it as well.

    Args:
        folder: A folder that exists.
        model: Its settings are written.
        tokenizer: Written beside it.
        weights: The weights to write; None: the model's, as they are held.
    """
    weights = weights or SavedWeights(model)
    model.save_pretrained(folder, state_dict={})
    weights.write(folder)
    _name_dtype(folder / CONFIG, model.dtype, weights.dtype)
    write_beside_weights(folder, model, tokenizer)


def write_tokenizer(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer, and what belongs to the model beside its weights, so that other programs read them.

    That is the files that training does not change, and where generation ends: also beside an adapter, which may have
    learned to end texts with another token than its base.
    """
    tokenizer.save_pretrained(folder)
    origin = origin_of(model)
    for name, content in origin.files.items():
        (folder / name).write_bytes(content)
    if model.can_generate():
        # Not the model's own: another thread may be generating by other settings at this moment.
        generation = origin.generation or model.generation_config.to_diff_dict()
        write_json(folder / GENERATION, complete(generation, tokenizer))
    _name_tokenizer(folder / _TOKENIZER, tokenizer)
    for name in (_TOKENIZER, "special_tokens_map.json"):
        _name_end(folder / name, tokenizer)


def write_licence(folder: Path, model: PreTrainedModel) -> None:
    """Write the licence files of a model into a folder."""
    for name, content in origin_of(model).files.items():
        if _LICENCE.fullmatch(name):
            (folder / name).write_bytes(content)


def _os_error(error: Exception) -> OSError | None:
    """Return what the system refused, which safetensors and tokenizers tell by errors of their own; or None."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), "") if number else None


def write_beside_weights(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Complete a folder into which a model was saved: what opened the model before opens it as well."""
    origin = origin_of(model)
    _ask_again(folder / CONFIG, origin.asked)
    write_tokenizer(folder, model, tokenizer)


def warn_of_ignored(model: PreTrainedModel) -> None:
    """Say which generation settings of a model are not saved with it, since transformers ignores and refuses them."""
    if ignored := origin_of(model).ignored:
        shown = ", ".join(f"`{name}: {value}`" for name, value in ignored.items())
        _log.warning(
            "%s of %s sets %s, which transformers ignores beside the other settings there and refuses to save: the "
            "saved model is without; to keep what is for sampling, set `do_sample: true` there",
            GENERATION,
            model.name_or_path,
            shown,
        )


def prove_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prove, before hours go into it, that a model can be saved and read again; return a line that says so.

    Settings and tokenizer are written and read back. Of the weights, names and shapes alone are put into the form that
    is saved, and read as a model without content.

    Raises:
        UserError: Something fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            model.save_pretrained(folder, state_dict={})
            write_beside_weights(folder, model, tokenizer)
            config = type(model.config).from_pretrained(folder)
            if (folder / GENERATION).is_file():
                type(model.generation_config).from_pretrained(folder)
            type(tokenizer).from_pretrained(folder)
            told = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
            _, report = type(model).from_pretrained(None, config=config, state_dict=SavedWeights(model).sketch, **told)
        except OSError as error:
            raise from_os_error(error, "trying to save the model", scratch) from error
        except Exception as error:
            # What libraries raise for what they cannot write or read is of every kind.
            if refusal := _os_error(error):
                raise from_os_error(refusal, "trying to save the model", scratch) from error
            reason, hint = reason_and_hint(error, model.name_or_path, folder)
            raise UserError(f"the model could not be saved: {reason}", model.name_or_path, hint) from error
    check_complete(model, report, model.name_or_path)
    return "the model can be saved and read again"


def _ask_again(file: Path, asked: dict[str, dict[str, Any]]) -> None:
    """Write back what a model's settings asked for beside its logits; transformers refuses some of it in writing."""
    if asked:
        written = json.loads(file.read_text(encoding="utf-8"))
        for name, settings in asked.items():
            (written[name] if name else written).update(settings)
        write_json(file, written)


def write_json(file: Path, settings: dict[str, Any]) -> None:
    """Write settings as transformers does."""
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_dtype(file: Path, held: torch.dtype, saved: torch.dtype) -> None:
    """Let the settings name the dtype that weights are saved in where they name the one they were held in."""
    if held != saved:
        before, after = (json.dumps(str(dtype).removeprefix("torch.")) for dtype in (held, saved))
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(f'"dtype": {before}', f'"dtype": {after}'), encoding="utf-8")


def _name_tokenizer(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Call a tokenizer by names that older versions of transformers know, and let it have the template of the run."""
    written = json.loads(file.read_text(encoding="utf-8"))
    if written.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    if "chat_template" in written:
        # The template is in a file of its own; where it was here as well, older programs look for it here.
        del written["chat_template"]
        if isinstance(tokenizer.chat_template, str):
            written["chat_template"] = tokenizer.chat_template
        elif tokenizer.chat_template:
            named = tokenizer.chat_template.items()
            written["chat_template"] = [{"name": name, "template": text} for name, text in named]
    file.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_end(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a file of the tokenizer name the token that ends texts, where a setting made it another one."""
    if not file.is_file():
        return
    written = json.loads(file.read_text(encoding="utf-8"))
    known = written.get("eos_token", None if file.name == _TOKENIZER else tokenizer.eos_token)
    if (known.get("content") if isinstance(known, dict) else known) != tokenizer.eos_token:
        written["eos_token"] = tokenizer.eos_token
        file.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
