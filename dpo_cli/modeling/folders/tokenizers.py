"""A model's tokenizer, and the tokens that end what the model writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import adapter_folder, base_name, holds_adapter, read_adapter
from dpo_cli.modeling.folders.model_files import GENERATION, NO_TRUST, Trust, holds_tokenizer
from dpo_cli.modeling.folders.refusals import explained
from dpo_cli.modeling.folders.resolving import load_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE = "chat_template.jinja"

_log = logging.getLogger(__name__)


def load_tokenizer(name: str, trust: Trust = NO_TRUST) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UserError: It cannot be found or read.
    """
    if trust.remote_code:
        _log.warning(
            "`model.trust_remote_code`: Python files that come with a model are run with your rights: "
            "they can read, change and send whatever you can"
        )

    if holds_adapter(name):
        return _beside_adapter(adapter_folder(name), trust)
    try:
        return load_named(name, "tokenizer", lambda folder: _read(folder, trust), trust)
    except UserError as error:
        if not Path(name).is_dir() or holds_tokenizer(Path(name)):
            raise
        hint = "copy tokenizer.json and tokenizer_config.json there, or save or download the model again"
        raise UserError("the model has no tokenizer: its files are missing", name, hint) from error


def _read(folder: str, trust: Trust) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
    words: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(words, "dropout", None):
        # As that of models it is for their training; with it a text has other tokens each time.
        words.dropout = None
    return tokenizer


def _beside_adapter(folder: Path, trust: Trust) -> PreTrainedTokenizerBase:
    """Load the tokenizer that is used with an adapter: tokenizer and template of its folder, else of its base."""
    found = read_adapter(folder)
    base, template = base_name(found), folder / _TEMPLATE
    if not holds_tokenizer(folder):
        tokenizer = load_tokenizer(base, trust)
    else:
        with explained(str(folder), "tokenizer"):
            tokenizer = _read(str(folder), trust)
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(base, trust).chat_template
    return tokenizer


def own_template(adapter: str | Path, used: str | None) -> Path | None:
    """Return the file of an adapter's chat template, if it has one and that is not the one that is used."""
    file = adapter_folder(adapter) / _TEMPLATE
    return file if file.is_file() and file.read_text(encoding="utf-8") != used else None


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, name: str, where: str, trust: Trust = NO_TRUST) -> None:
    """Refuse another model whose ids stand for other tokens; a folder without a tokenizer is not asked.

    Args:
        tokenizer: What the pairs are tokenized with.
        name: The other model.
        where: What names it: a setting or an option.
        trust: What it may bring along.

    Raises:
        UserError: Ids differ; it names the first.
    """
    if Path(name).is_dir() and not holds_tokenizer(Path(name)):
        return
    ours, theirs = ({i: t for t, i in known.get_vocab().items()} for known in (tokenizer, load_tokenizer(name, trust)))
    if differing := sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]):
        shown = "; ".join(f"id {i} is {theirs[i]!r} there and {ours[i]!r} here" for i in differing[:3])
        what = f"`{name}` has another vocabulary than the pairs: {len(differing)} ids differ ({shown})"
        raise UserError(what, where, "choose a model with the same tokenizer as `model.name`")


def generation_config(name: str, trust: Trust = NO_TRUST) -> GenerationConfig:
    """Load what a model says of generation, or an adapter in its place: of it the end tokens are used.

    Raises:
        UserError: The model cannot be found or read.
    """
    if holds_adapter(name) and ((own := adapter_folder(name)) / GENERATION).is_file():
        with explained(name, "adapter"):
            return GenerationConfig.from_pretrained(str(own))

    def load(folder: str) -> GenerationConfig:
        if (Path(folder) / GENERATION).is_file():
            return GenerationConfig.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        return GenerationConfig.from_model_config(config)

    return load_named(name, "model", load, trust)
