"""A model becomes a folder again: what training moved, and all else as it was in the folder that it came from."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.modeling.completeness import configs
from dpo_cli.modeling.model_files import CONFIG, MOST_TEXT_BYTES, Trust
from dpo_cli.storage import refused, sealed_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_ALONE = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""What a model's settings ask for beside its logits, and what they say where they ask for nothing."""

_BELONGS = re.compile(
    r"(\w+_)?(pre)?processor_config\.json|tokenizer(_config)?\.json|(special_tokens_map|added_tokens|tekken)\.json"
    r"|vocab\.(json|txt|bpe)|merges\.txt|.+\.(model|tiktoken|spm)|tokenizer\.model\..+"
    r"|(licen[cs]e|notice|copying|use_policy|acceptable_use_policy)[\w.-]*",
    re.IGNORECASE,
)
"""Files of a model that training does not change: of tokenizer and processors, and the licence."""

_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Origin:
    """What a model's folder held that what is saved holds again.

    Attributes:
        asked: What its settings asked for beside the logits, by the name of the model within; the whole is "".
        files: The files that belong to it, by name.
    """

    asked: dict[str, dict[str, Any]]
    files: dict[str, bytes]


def remember(model: PreTrainedModel, folder: Path, trust: Trust) -> None:
    """Keep with a model what its folder holds beside weights, since the folder may be gone when the model is saved.

    Args:
        model: The model.
        folder: Where it came from.
        trust: Python files belong to a model that is trusted with them.
    """
    files = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if (_BELONGS.fullmatch(path.name) or (trust.remote_code and path.suffix == ".py"))
        and path.is_file()
        and path.stat().st_size <= MOST_TEXT_BYTES
    }
    model.origin = Origin(logits_alone(model), files)


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
def saved_model(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    doing: str,
    weights: dict[str, Tensor] | None = None,
) -> Iterator[Path]:
    """Write model and tokenizer as a sealed Hugging Face folder, to which the caller may add files.

    Args:
        target: The folder to appear.
        model: Its settings are written, and its weights unless `weights` are given.
        tokenizer: Written beside it.
        doing: What failed, where it fails.
        weights: The weights to write, by name, tied ones under each of their names.

    Raises:
        UserError: The disk refuses. `target` is as it was then.
    """
    try:
        with sealed_folder(target, {}) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            write_beside_weights(temporary, model, tokenizer)
            yield temporary
    except OSError as error:
        raise refused(error, doing, target) from error
    except Exception as error:
        # What the system refuses them, safetensors and tokenizers tell by errors of their own.
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise refused(OSError(int(number[1]), ""), doing, target) from error


def write_beside_weights(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Complete a folder into which a model was saved: what opened the model before opens it as well."""
    origin: Origin = getattr(model, "origin", Origin({}, {}))
    _ask_again(folder / CONFIG, origin.asked)
    tokenizer.save_pretrained(folder)
    for name, content in origin.files.items():
        (folder / name).write_bytes(content)
    _name_tokenizer(folder / _TOKENIZER, tokenizer)
    for name in (_TOKENIZER, "special_tokens_map.json"):
        _name_end(folder / name, tokenizer)


def _ask_again(file: Path, asked: dict[str, dict[str, Any]]) -> None:
    """Write back what a model's settings asked for beside its logits; transformers refuses some of it in writing."""
    if asked:
        written = json.loads(file.read_text(encoding="utf-8"))
        for name, settings in asked.items():
            (written[name] if name else written).update(settings)
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
