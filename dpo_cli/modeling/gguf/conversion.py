"""A GGUF file becomes an ordinary model folder in the cache: without weights, or with them where they are needed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.folders.completeness import load_complete
from dpo_cli.modeling.folders.refusals import explained
from dpo_cli.modeling.folders.saving import end_at, saved_folder, saved_model, write_beside_weights
from dpo_cli.modeling.folders.size_checks import check_room
from dpo_cli.modeling.gguf.about import card_of_file
from dpo_cli.modeling.gguf.content import DAMAGED, GgufContent, check_all_read, settle_experts, settle_settings
from dpo_cli.modeling.gguf.package import gguf_package
from dpo_cli.modeling.gguf.positions import settle_positions
from dpo_cli.modeling.gguf.streaming import Streaming, read_as
from dpo_cli.modeling.gguf.tokenizers import ends_of, tokenizer_of
from dpo_cli.modeling.held import FLOAT32
from dpo_cli.system.hub import CARD
from dpo_cli.system.storage import DamagedFolder, cache_root, file_digest, verify

_CONVERSION = 5
"""Counts up when GGUF files are converted otherwise than before."""

_log = logging.getLogger(__name__)


def settings_of(path: Path) -> Path:
    """Write what a GGUF file holds beside its weights into a folder in the cache, once for each content."""
    return _kept(path, "-settings", functools.partial(_write_settings, path))


def write_settings(path: Path, folder: Path) -> None:
    """Write what a GGUF file holds beside its weights into a folder that does not exist yet.

    Raises:
        UserError: The file cannot be read, or the folder not be written.
    """
    _write_read(path, folder, functools.partial(_write_settings, path))


def _write_settings(path: Path, folder: Path, content: GgufContent) -> None:
    config = read_config(path, content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    check_all_read(model, content)
    tokenizer = tokenizer_of(path)
    for end in reversed(ends_of(path)):
        end_at(model, end)
    with saved_folder(folder, "keeping the model's settings") as temporary:
        model.save_pretrained(temporary, state_dict={})
        write_beside_weights(temporary, model, tokenizer)
        _write_about(temporary, content)


def read_config(path: Path, content: GgufContent) -> PretrainedConfig:
    """Return the configuration that a GGUF file says, also what of it transformers passes over.

    Raises:
        UserError: It says something that is not known here.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    # What the file calls the model is no setting of it.
    vars(config).pop("_model_name_or_path", None)
    settle_settings(config.get_text_config(), content)
    settle_experts(config, content)
    settle_positions(config.get_text_config(), content)
    return config


def converted(path: Path) -> Path:
    """Dequantize a GGUF file into a model folder in the cache, once for each content."""

    def write(folder: Path, content: GgufContent) -> None:
        check_room(4 * sum(content.sizes.values()), FLOAT32, torch.device("cpu"))
        tokenizer = tokenizer_of(path)
        model = dequantized(path, settings_of(path))
        with saved_model(folder, model, tokenizer, "keeping the converted model") as temporary:
            _write_about(temporary, content)

    said = f"converting {path.name} to an ordinary model folder, once; this takes up to a minute"
    return _kept(path, "", write, said)


def _write_about(folder: Path, content: GgufContent) -> None:
    """Write down where the model comes from, as far as its file tells."""
    (folder / CARD).write_text(card_of_file(content.about), encoding="utf-8")


def dequantized(path: Path, settings: Path) -> PreTrainedModel:
    """Load the model in a GGUF file, in float32, of which nothing is written.

    Args:
        path: The file.
        settings: The folder with its settings.
    """
    # transformers would keep all that it read for the settings in memory while it loads the weights.
    config = AutoConfig.from_pretrained(settings)
    told = {"gguf_file": path.name, "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
    with read_as(Streaming):
        model = load_complete(AutoModelForCausalLM, str(path.parent), config=config, **told)
    # What is left are ordinary float32 weights; while these marks stay, transformers refuses to save them.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    return model


def _kept(path: Path, part: str, write: Callable[[Path, GgufContent], None], said: str = "") -> Path:
    """Return a folder in the cache for a file, which is written if it is not there whole.

    Args:
        path: The GGUF file.
        part: Tells what of the file is kept apart from other folders for it.
        write: Writes the folder, given what is asked of the file.
        said: What is said before it does.

    Raises:
        UserError: The file cannot be read, or the folder not be written.
    """
    try:
        folder = cache_root() / "models" / f"{file_digest(path)[:32]}-{_CONVERSION}{part}"
    except OSError as error:
        raise from_os_error(error, "reading the model", str(path), status=2) from error
    if folder.exists():
        try:
            verify(folder)
            return folder
        except DamagedFolder as damage:
            _log.warning("the converted model is damaged (%s); converting again", damage)
    if said:
        _log.warning(said)
    _write_read(path, folder, write)
    return folder


def _write_read(path: Path, folder: Path, write: Callable[[Path, GgufContent], None]) -> None:
    """Write a folder of what is read from a file."""
    gguf_package("reading", str(path))
    from dpo_cli.modeling.gguf.reader import fast_reading, read_content

    with explained(str(path), "model"), fast_reading():
        content = read_content(path)
        try:
            write(folder, content)
        except (OSError, UnicodeDecodeError) as error:
            if UnicodeDecodeError not in (type(error), type(error.__context__)):
                raise
            # transformers may say in its place that this does not look like JSON.
            raise UserError("the GGUF file has texts that are not UTF-8", None, DAMAGED) from error
