"""What rounding to the types of GGUF files may change, by the steps that each type has."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build

from dpo_cli.errors import UserError
from dpo_cli.modeling.gguf import tensors
from dpo_cli.modeling.gguf.types import GGUF_TYPES, GgufType, check_rounding, rounded

KINDS = [kind for kind in GGUF_TYPES if kind != "f32"]


def weights(seed: int, size: float) -> torch.Tensor:
    """Weights of one sign, of both, and far from 0, row by row."""
    some = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat([some, some.abs(), -some.abs(), some + 5 * size])


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 300.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_rounding_does_is_explained_by_the_steps_of_a_type(kind: GgufType, size: float) -> None:
    for seed in range(3):
        some = weights(seed, size)
        check_rounding(some, rounded(some, kind), kind, "blk.0.ffn_up.weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["zeros", "turned", "halved", "next rows", "none"])
def test_what_rounding_does_not_explain_is_refused(kind: GgufType, fault: str) -> None:
    some = weights(0, 0.02)
    read = rounded(some, kind)
    changed = {
        "zeros": torch.zeros_like(read), "turned": -read, "halved": read / 2, "next rows": read.roll(1, 0),
        "none": torch.cat([read[:-1], torch.full_like(read[-1:], torch.nan)]),
    }  # fmt: skip
    with pytest.raises(UserError, match=rf"rounding to {kind} changes a weight of `up` by .*, where its steps explain"):
        check_rounding(some, changed[fault], kind, "up")


def test_a_model_is_not_exported_if_its_weights_are_rounded_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written would have the same weights, so that comparing both would say nothing of it."""
    monkeypatch.setattr(tensors, "rounded", lambda weight, kind: rounded(weight, kind) * 1.5)
    with pytest.raises(UserError, match="rounding to q8_0 changes a weight of"):
        tensors.round_as_in_file(build("llama"), "q8_0")
