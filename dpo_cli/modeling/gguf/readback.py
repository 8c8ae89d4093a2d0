"""The settings of a file are read back before its weights are written: what a reader would set otherwise is refused."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoConfig

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.gguf.architectures import ARCHITECTURES
from dpo_cli.modeling.gguf.content import GgufContent
from dpo_cli.modeling.gguf.conversion import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dpo_cli.modeling.gguf.header import Header
    from dpo_cli.modeling.gguf.tensors import Written

_ASIDE = re.compile(
    r"architectures|auto_map|dtype|transformers_version|_(model_)?name_or_path|model_type|use_cache|initializer_range"
    r"|vocab_size|.*(dropout|pdrop|token_id)|id2label|label2id|return_dict|output_\w+|problem_type|chunk_size_feed_forward"
    r"|is_encoder_decoder|pretraining_tp|summary_\w+|max_window_layers|_?sliding_window_pattern"
)
"""Settings that no forward pass depends on, or that others say again."""

_EQUAL = 1e-6
"""How far numbers may be apart: files keep 32 bits of them."""


def read_back(config: PretrainedConfig, header: Header, tensors: list[Written]) -> list[str]:
    """Check that readers of a file are told a model's settings; return those that transformers by itself passes over.

    Args:
        config: The settings.
        header: What the file says of the model.
        tensors: What it holds.

    Raises:
        UserError: `model:` would set one otherwise.
    """
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "settings.gguf"
        _write(file, header, tensors)
        found = GgufContent.of(GGUFReader(file))
        sizes = {one.name: math.prod(one.shape) for one in tensors}
        read = read_config(file, GgufContent(found.architecture, sizes, found.tables, found.settings))
        alone: PretrainedConfig = AutoConfig.from_pretrained(scratch, gguf_file=file.name)
    aside = ARCHITECTURES[config.model_type].aside
    if wrong := differing(config, read, aside):
        hint = "write a model folder instead: leave out `--gguf`"
        what = f"a GGUF file of the architecture `{header.architecture}` cannot say: {', '.join(wrong)}"
        raise UserError(what, config.name_or_path, hint, status=FAILED)
    return differing(config, alone, aside)


def _write(file: Path, header: Header, tensors: list[Written]) -> None:
    """Write a file that says the same of a model whose weights are one number each."""
    writer = header.writer()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([""])
    for tensor in tensors:
        table = tensor.take().float().numpy() if tensor.name.startswith("rope_") else np.zeros(1, np.float32)
        writer.add_tensor(tensor.name, table)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def differing(ours: PretrainedConfig, read: PretrainedConfig, aside: Collection[str] = ()) -> list[str]:
    """Return the settings, by name and in order, that two configurations have otherwise and a pass depends on."""
    ours, read = ours.get_text_config(), read.get_text_config()
    said, found = ours.to_dict(), read.to_dict()
    names = sorted(name for name in said.keys() & found.keys() if name not in aside and not _ASIDE.fullmatch(name))
    return [name for name in names if not _same(_meant(ours, name, said[name]), _meant(read, name, found[name]))]


def _meant(config: PretrainedConfig, name: str, value: Any) -> Any:
    """Return what a setting means that is left open."""
    if value is not None:
        return value
    if name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if name == "n_inner":
        return 4 * config.n_embd
    return config.num_attention_heads if name == "num_key_value_heads" else None


def _same(ours: Any, read: Any) -> bool:
    """Compare two values; of mappings, what both of them have."""
    if isinstance(ours, Mapping) and isinstance(read, Mapping):
        return all(_same(ours[name], read[name]) for name in ours.keys() & read.keys())
    if isinstance(ours, (int, float)) and isinstance(read, (int, float)):
        return math.isclose(ours, read, rel_tol=_EQUAL)
    return bool(ours == read)
