"""Which models a GGUF file can hold: one table, from which files are written, checked and read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from dpo_cli.modeling.gguf.architecture import Architecture, Config
from dpo_cli.modeling.gguf.dense import DENSE
from dpo_cli.modeling.gguf.mixed import MIXED

ARCHITECTURES: Mapping[str, Architecture] = {**DENSE, **MIXED}
"""By `model_type` of a configuration."""

REFUSED: Mapping[str, str] = {
    "gemma4": "transformers reads it with end tokens and kinds of layers of its own, whatever it says",
    "gemma4_text": "transformers reads it with end tokens and kinds of layers of its own, whatever it says",
    "gpt_oss": "transformers does not read the experts in it, nor how positions are scaled",
    "mixtral": "transformers reads it as a Llama without experts",
}
"""Models whose files llama.cpp reads, but which cannot be proved: why, by `model_type`."""

_TEXT_ALONE = ("qwen3_5", "qwen3_5_moe")
"""Models for images and text of which the language model is taken for the whole."""


def gguf_problem(config: Config) -> str | None:
    """Return why a model cannot be written as a GGUF file; None: it can.

    Args:
        config: Its config.json.
    """
    if config.get("model_type") in _TEXT_ALONE:
        config = config.get("text_config", {})
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if kind in REFUSED:
        return f"a GGUF file of `model_type: {kind}` cannot be proved: {REFUSED[str(kind)]}"
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        return f"a GGUF file cannot be written of `model_type: {kind}`; it can of: {known}"
    found = [
        f"`{name}: {config[name]}`, where the file means {values[0]}"
        for name, values in architecture.only.items()
        if name in config and config[name] not in values
    ]
    found += [problem for check in _CHECKS if (problem := check(architecture, config))]
    return f"a GGUF file cannot say what config.json says: {'; '.join(found)}" if found else None


def _head_problem(architecture: Architecture, config: Config) -> str | None:
    tied = config.get("tie_word_embeddings")
    if architecture.head == "either" or tied is None or tied == (architecture.head == "tied"):
        return None
    return f"`tie_word_embeddings: {tied}`, where the file means {not tied}"


def _rotary_problem(architecture: Architecture, config: Config) -> str | None:
    """Find positions that are scaled in a way which the file has no words for."""
    problems = [_scaling_problem(architecture, layers) for layers in rotary_settings(config).values()]
    return next((problem for problem in problems if problem), None)


def rotary_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return how positions are turned by the kind of layer, as config.json says it now or said it before; "" is all."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {kind: inner for kind, inner in said.items() if isinstance(inner, Mapping)}
    return {kind: dict(inner) for kind, inner in kinds.items()} or ({"": dict(said)} if said else {})


def _derived_problem(architecture: Architecture, config: Config) -> str | None:
    """Find a setting that readers compute otherwise; where that depends on defaults, it is found when it is written."""
    for name, compute in architecture.derived.items():
        with contextlib.suppress(AttributeError):
            if name in config and config[name] != (meant := compute(SimpleNamespace(**config))):
                return f"`{name}: {config[name]}`, where the file means {meant}"
    return None


_MEANT: Mapping[str, Mapping[str, Any]] = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True},
}
"""What a file means by how positions are scaled, beside what it says."""


def _scaling_problem(architecture: Architecture, said: Mapping[str, Any]) -> str | None:
    kind = said.get("rope_type", said.get("type", "default"))
    if architecture.rotary and kind not in architecture.rotary:
        known = ", ".join(architecture.rotary)
        return f"`rope_type: {kind}`, where a file of the architecture `{architecture.name}` knows: {known}"
    for name, meant in _MEANT.get(kind, {}).items():
        if said.get(name, meant) != meant:
            return f"`{name}: {said[name]}` of `rope_type: {kind}`, where the file means {meant}"
    if kind == "yarn" and not said.get("original_max_position_embeddings"):
        return "`rope_type: yarn` without `original_max_position_embeddings`"
    partial = said.get("partial_rotary_factor", 1.0)
    if partial != 1 and not architecture.partial:
        return f"`partial_rotary_factor: {partial}`, where the file means 1"
    return None


_CHECKS: tuple[Callable[[Architecture, Config], str | None], ...] = (
    lambda architecture, config: architecture.problem(config),
    _derived_problem,
    _head_problem,
    _rotary_problem,
)
