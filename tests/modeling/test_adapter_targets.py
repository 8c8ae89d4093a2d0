"""Which layers the names of a configuration mean, and that an adapter's first weights are the seed's alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import build
from torch import nn

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.adapters.targets import target_names
from dpo_cli.modeling.layouts import PACKED
from dpo_cli.modeling.policy import Policy
from tests.conftest import ROOT

Q_AND_V = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize(
    "asked",
    [
        ["q_proj", "v_proj"],
        ["v_proj", "self_attn.q_proj"],
        Q_AND_V,
        r".*\.[qv]_proj",
        r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        r".*[qv]_proj|.*norm",
    ],
    ids=["last names", "parts of names", "whole names", "pattern", "whole pattern", "pattern that matches norms too"],
)
def test_names_and_patterns_mean_layers_in_the_order_of_the_model(llama, asked):
    assert target_names(llama, asked) == Q_AND_V


def test_a_name_is_not_a_part_of_another_s(llama):
    for asked in (["proj"], ["roj"], ["layers.1"], "q_proj", r"layers\.0.*"):
        with pytest.raises(UserError, match="names no layer that can have an adapter") as refused:
            target_names(llama, asked)
        assert "q_proj" in refused.value.hint


def test_every_name_of_a_list_is_that_of_a_layer(llama):
    with pytest.raises(UserError, match="`w_pack` names no layer"):
        target_names(llama, ["q_proj", "w_pack"])


@pytest.mark.parametrize("asked", [["lm_head"], ["q_proj", "lm_head"], "lm_head", ".*", ".*(q_proj|head)"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_projection_has_no_adapter(asked, tied):
    with pytest.raises(UserError, match="vocabulary projection"):
        target_names(build("llama", tie_word_embeddings=tied), asked)


def test_a_layer_that_is_named_like_the_vocabulary_projection_in_part_can_have_one(llama):
    """Only the projection itself is refused, neither what its name is within nor what it is called elsewhere."""
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.lm_head_gate, layer.self_attn.head = nn.Linear(32, 32), nn.Linear(32, 32)
    names = ["model.layers.0.self_attn.lm_head_gate", "model.layers.1.self_attn.lm_head_gate"]
    assert target_names(model, ["lm_head_gate"]) == target_names(model, r".*lm_head_gate") == names
    assert len(target_names(model, ["head"])) == 2
    assert {*names, "model.layers.0.self_attn.head"} < set(target_names(model, "all-linear"))
    assert "lm_head" not in target_names(model, "all-linear")


@pytest.mark.parametrize("asked", [["embed_tokens"], ["input_layernorm"], ["layers"], ["experts"], ["gate_up_proj"]])
def test_what_is_not_linear_is_refused(asked):
    with pytest.raises(UserError, match="names no layer that can have an adapter"):
        target_names(build("mixtral"), asked)


def test_all_linear_leaves_routers_out_and_a_name_means_them():
    """They are linear layers in few architectures, and parameters in the others."""
    model = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    first.router = nn.Sequential(nn.Linear(32, 4))
    second.gate, second.experts, second.shared_expert_gate = nn.Linear(32, 4), nn.ModuleList(), nn.Linear(32, 1)
    chosen = target_names(model, "all-linear")
    assert "model.layers.1.mlp.shared_expert_gate" in chosen
    assert not {"model.layers.0.mlp.router.0", "model.layers.1.mlp.gate"} & set(chosen)
    assert target_names(model, ["router.0", "gate"]) == ["model.layers.0.mlp.router.0", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize("kind", ["deepseek_v3", "afmoe", "qwen3_next"])
def test_what_peft_would_put_beside_the_experts_is_refused(kind):
    """Of these types it takes any `gate_proj` for that of experts, and leaves the layer of that name without."""
    for asked in (["gate_proj"], ["q_proj", "down_proj"], r".*mlp\.(up|down)_proj"):
        with pytest.raises(UserError, match="names no layer"):
            target_names(build(kind), asked)


class Pair(nn.Linear):
    """Answers with more than one tensor, as the routers of some models do."""

    def forward(self, inputs):
        return super().forward(inputs), inputs


class Grouped(nn.Linear):
    """Multiplies by groups of features."""

    def forward(self, inputs):
        groups = self.weight.view(4, -1, self.weight.shape[1])
        return torch.einsum("...gi,goi->...go", inputs, groups)


class Spelled(nn.Linear):
    """Computes what a linear layer does."""

    def forward(self, inputs):
        return inputs @ self.weight.T + self.bias


def test_of_layers_derived_from_linear_ones_those_have_adapters_that_answer_as_linear_ones():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    attention.pair, attention.grouped, attention.spelled = Pair(32, 4), Grouped(32, 32), Spelled(32, 8)
    extra = [name.rpartition(".")[2] for name in target_names(model, "all-linear") if name.startswith("model.layers.0")]
    assert extra[-1] == "down_proj"
    assert {"pair", "grouped", "spelled"} & set(extra) == {"spelled"}
    for refused in ("pair", "grouped"):
        with pytest.raises(UserError, match=f"`{refused}` names no layer"):
            target_names(model, [refused])


def first_weights(seed, kind="llama", **settings):
    return Adapted(Lora(rank=4, **settings), seed).choose(build(kind)).state()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dora", [False, True])
def test_first_weights_depend_on_the_seed_alone(dora):
    expected = first_weights(3, dora=dora)
    torch.manual_seed(99)
    torch.randn(7)
    assert same(first_weights(3, dora=dora), expected)
    model = build("llama")
    PACKED.prepare(model)
    policy = Policy(model, Adapted(Lora(rank=4, dora=dora), 3))
    assert same(policy.weights.state(), expected)
    assert not same(first_weights(4, dora=dora), expected)


def test_choosing_an_adapter_draws_no_number_that_others_would_have_drawn():
    model = build("llama")
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    Adapted(Lora(), 3).choose(model)
    assert torch.equal(torch.randn(3), expected)


WRITE = """
import sys, warnings
from pathlib import Path
import torch
from tiny_models import build
from transformers import AutoTokenizer
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
torch.set_num_threads(1)
adapter = Adapted(Lora(rank=4), 0).choose(build(sys.argv[1]))
adapter.write(Path(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[3]))
"""


@pytest.mark.program
@pytest.mark.slow
def test_files_have_the_same_bytes_in_every_process(tmp_path, tokenizer_folder):
    """Python's sets are ordered by a hash that is another in every process."""
    digests = set()
    for seed in ("1", "2"):
        (folder := tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "scripts")}
        command = [sys.executable, "-c", WRITE, "llama", str(folder), str(tokenizer_folder)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        parts = [file.name.encode() + file.read_bytes() for file in sorted(folder.iterdir())]
        digests.add(hashlib.sha256(b"".join(parts)).hexdigest())
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert len(settings["target_modules"]) > 1
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("llama", "all-linear", "LoRA rank 4 on 14 layers"),
        ("mixtral", "all-linear", "LoRA rank 4 on 8 layers, not on gate, experts"),
        ("mixtral", ["q_proj"], "LoRA rank 4 on 2 layers"),
        ("mamba", "all-linear", "LoRA rank 4 on 4 layers, not on conv1d, dt_proj, out_proj"),
    ],
)
def test_a_run_says_what_all_linear_leaves_out(kind, targets, said):
    assert Adapted(Lora(rank=4, targets=targets)).choose(build(kind)).described == said
