"""Which kernel of attention a run uses: by its device and by what is asked for."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from dpo_cli.config.schema import TrainingSettings
from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.kernels import KERNELS, kernels_for
from dpo_cli.modeling.attention.trees import windows_of


def test_every_kernel_can_be_asked_for():
    assert set(TrainingSettings.model_json_schema()["properties"]["attention"]["enum"]) == {"auto", *KERNELS}


@pytest.mark.parametrize(
    ("asked", "device", "tried"),
    [
        ("auto", "cpu", ["pieces"]),
        ("auto", "mps", ["pieces"]),
        ("auto", "cuda", ["flex", "varlen"]),
        ("pieces", "cuda", ["pieces"]),
        ("pieces", "cpu", ["pieces"]),
        ("flex", "cuda", ["flex"]),
        ("varlen", "cuda", ["varlen"]),
    ],
)
def test_kernels_are_tried_in_an_order_that_the_device_decides(asked, device, tried):
    assert [kernel.name for kernel in kernels_for(asked, device)] == tried


@pytest.mark.parametrize("asked", ["flex", "varlen"])
def test_a_kernel_of_gpus_is_refused_on_a_cpu(asked):
    with pytest.raises(UserError, match=f"`training.attention: {asked}` needs an NVIDIA or AMD GPU") as caught:
        kernels_for(asked, "cpu")
    assert caught.value.where == "`training.attention`"
    assert "`pieces`" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LlamaConfig(), (None,)),
        (MistralConfig(sliding_window=5), (5,)),
        (MistralConfig(sliding_window=None), (None,)),
        (Gemma2Config(sliding_window=7, num_hidden_layers=4), (None, 7)),
    ],
)
def test_the_windows_of_a_models_layers_are_read_from_its_settings(config, windows):
    assert windows_of(config) == windows
