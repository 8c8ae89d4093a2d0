"""A GGUF file becomes an ordinary model folder: it is dequantized once, into the cache."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.completeness import load_complete
from dpo_cli.modeling.gguf_files import check_all_read, settle_positions
from dpo_cli.modeling.held import FLOAT32
from dpo_cli.modeling.refusals import explained
from dpo_cli.modeling.saving import saved_model
from dpo_cli.modeling.size_checks import check_room
from dpo_cli.system.storage import DamagedFolder, cache_root, file_digest, verify

_CONVERSION = 2
"""Counts up when GGUF files are converted otherwise than before."""

_log = logging.getLogger(__name__)


def converted(path: Path) -> Path:
    """Dequantize a GGUF file into a model folder in the cache, once for each content."""
    try:
        folder = cache_root() / "models" / f"{file_digest(path)[:32]}-{_CONVERSION}"
    except OSError as error:
        raise from_os_error(error, "reading the model", str(path), status=2) from error
    if folder.exists():
        try:
            verify(folder)
            return folder
        except DamagedFolder as damage:
            _log.warning("the converted model is damaged (%s); converting again", damage)
    try:
        import gguf  # transformers needs it as well, and explains its absence badly
    except ImportError:
        hint = "install it with `pip install 'dpo-cli[gguf]'`"
        raise UserError("reading a GGUF file needs the package `gguf`", str(path), hint) from None
    _log.warning("converting %s to an ordinary model folder, once; this takes up to a minute", path.name)
    parent, file = str(path.parent), path.name
    with explained(str(path), "model"):
        reader = gguf.GGUFReader(path)
        check_room(sum(4 * int(tensor.n_elements) for tensor in reader.tensors), FLOAT32, torch.device("cpu"))
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
        told = {"gguf_file": file, "quantization_config": GgufConfig(gguf_file=file, dequantize=True)}
        model = load_complete(AutoModelForCausalLM, parent, **told)
        check_all_read(model, reader)
        settle_positions(model, reader)
    # What is left are ordinary float32 weights; while these marks stay, transformers refuses to save them.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    with saved_model(folder, model, tokenizer, "keeping the converted model"):
        pass
    return folder
