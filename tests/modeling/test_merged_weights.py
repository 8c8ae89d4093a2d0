"""An adapter merged into its base: by hand, against PEFT, and what must not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.folders.saved_weights import round_as_saved
from dpo_cli.modeling.folders.saving import origin_of
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.policy import Policy
from tests.builders import stirred
from tests.conftest import build_llama

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
MODELS = ("tied", "untied", "gpt2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = "model.safetensors"

# PEFT asks for it by the older of its names.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[tuple[str, str], Path]:
    """A tiny model of each kind in each dtype."""
    found = {}
    for name in MODELS:
        for dtype in DTYPES:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            if name == "gpt2":
                torch.manual_seed(0)
                settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
                GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **settings)).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            else:
                build_llama(folder, tokenizer, seed=0, tie_word_embeddings=name == "tied")
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
            found[name, dtype] = folder
    return found


def adapted(base: Path, **settings: Any) -> Policy:
    """Return a policy whose adapter has learned something, all of its parts."""
    policy = Policy.load(str(base), trained=Adapted(Lora(rank=4, alpha=6, **settings)))
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in policy.weights.trained():
            weights += 0.1 * torch.randn_like(weights)
    return policy


def saved(policy: Policy, folder: Path, tokenizer: Any, types: WeightTypes | None = None) -> Path:
    folder.mkdir()
    policy.weights.write(folder, tokenizer, types=types)
    return folder


def merged(policy: Policy, base: Path, folder: Path, tokenizer: Any) -> Path:
    """Merge as an export does, and return the folder."""
    types = WeightTypes.of_files(base)
    policy.merge()
    written = saved(policy, folder, tokenizer, types)
    policy.weights.check_written(written, types=types)
    return written


def ids(tokenizer: Any) -> torch.Tensor:
    found: torch.Tensor = tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weights_are_those_of_peft_rounded_once(bases, tokenizer, tmp_path, kind, model, dtype):
    """PEFT merges in float32, where rounding to the base's dtype comes last; what differs is the order of sums."""
    base = bases[model, dtype]
    policy = adapted(base, **KINDS[kind])
    adapter = saved(policy, tmp_path / "adapter", tokenizer)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
    expected = theirs.merge_and_unload().state_dict()
    found = load_file(merged(policy, base, tmp_path / "merged", tokenizer) / WEIGHTS)
    assert found.keys() == load_file(base / WEIGHTS).keys()
    # Half a unit in the last place of a number that bfloat16 rounds is 2^-9 of it.
    share = 2**-8 if dtype == "bfloat16" else 1e-5
    for name, weights in found.items():
        assert weights.dtype == DTYPES[dtype]
        torch.testing.assert_close(weights.float(), expected[name], rtol=share, atol=1e-6)
    once = sum(int((weights != expected[name].to(DTYPES[dtype])).sum()) for name, weights in found.items())
    # A sum in another order may be rounded to the neighbour, seldom.
    assert dtype == "float32" or once <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weights_are_those_of_the_formula(bases, tokenizer, tmp_path, kind):
    """W + scale · B A; with DoRA each row of that over its norm, times its magnitude; in float64 by hand."""
    base = bases["untied", "float32"]
    policy = adapted(base, targets=["q_proj"], **KINDS[kind])
    adapter = load_file(saved(policy, tmp_path / "adapter", tokenizer) / "adapter_model.safetensors")
    found = load_file(merged(policy, base, tmp_path / "merged", tokenizer) / WEIGHTS)
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    scale = 6 / 4**0.5 if kind == "rslora" else 6 / 4
    expected = load_file(base / WEIGHTS)[f"{name}.weight"].double() + scale * b @ a
    if kind == "dora":
        magnitude = adapter[f"base_model.model.{name}.lora_magnitude_vector"].double()
        expected = magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "dtype"), [("tied", "bfloat16"), ("untied", "float32"), ("gpt2", "bfloat16")])
def test_weights_that_no_adapter_touches_keep_their_bytes(bases, tokenizer, tmp_path, model, dtype):
    base = bases[model, dtype]
    targets = ["c_attn"] if model == "gpt2" else ["q_proj"]
    policy = adapted(base, targets=targets)
    found = load_file(merged(policy, base, tmp_path / "merged", tokenizer) / WEIGHTS)
    for name, weights in load_file(base / WEIGHTS).items():
        same = torch.equal(weights.view(torch.uint8), found[name].view(torch.uint8))
        assert same == (targets[0] not in name or name.endswith("bias")), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_answers_in_transformers_alone_as_the_adapter_does_in_peft(
    bases, tokenizer, tmp_path, kind, model
):
    base = bases[model, "float32"]
    policy = adapted(base, **KINDS[kind])
    adapter = saved(policy, tmp_path / "adapter", tokenizer)
    folder = merged(policy, base, tmp_path / "merged", tokenizer)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    plain = AutoModelForCausalLM.from_pretrained(base)
    changed = 0
    for place in range(10):
        asked = {"input_ids": ids(tokenizer)[:, place // 2 :] + place % 2}
        # The bases name no end token, or one beyond their vocabulary; the merged model names that of the tokenizer.
        how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
        expected = theirs.generate(**asked, **how)
        assert torch.equal(ours.generate(**asked, **how), expected)
        changed += not torch.equal(plain.generate(**asked, **how), expected)
    assert changed


def test_settings_generation_and_licence_are_the_bases(bases, tokenizer, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["tied", "bfloat16"], base)
    (base / "LICENSE").write_text("Do what you like.\n", encoding="utf-8")
    said = {**json.loads((base / "generation_config.json").read_text(encoding="utf-8")), "temperature": 0.7}
    (base / "generation_config.json").write_text(json.dumps({**said, "do_sample": True}), encoding="utf-8")
    folder = merged(adapted(base), base, tmp_path / "merged", tokenizer)
    ours, theirs = (json.loads((one / "config.json").read_text(encoding="utf-8")) for one in (folder, base))
    assert ours == theirs
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["temperature"] == 0.7
    assert (folder / "LICENSE").read_text(encoding="utf-8") == "Do what you like.\n"
    assert not list(folder.glob("adapter*"))


def test_weights_of_several_types_keep_each_their_own(bases, tokenizer, tmp_path):
    """Norms are often float32 in a model of bfloat16."""
    base = tmp_path / "base"
    shutil.copytree(bases["untied", "bfloat16"], base)
    mixed = {name: t.float() * 1.001 if "norm" in name else t for name, t in load_file(base / WEIGHTS).items()}
    save_file(mixed, base / WEIGHTS, metadata={"format": "pt"})
    folder = merged(adapted(base), base, tmp_path / "merged", tokenizer)
    found = load_file(folder / WEIGHTS)
    assert {name: weights.dtype for name, weights in found.items()} == {n: t.dtype for n, t in mixed.items()}
    for name in mixed:
        assert torch.equal(found[name], mixed[name]) == ("proj" not in name)


def test_weights_that_files_keep_apart_are_rounded_in_memory_as_they_are_written(tokenizer, tmp_path):
    """Experts have other names in memory than in the files, whose types differ: routers are often float32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / WEIGHTS
    mixed = {name: t if "gate.weight" in name else t.bfloat16() for name, t in load_file(file).items()}
    save_file({n: t * 1.01 if t.dtype == torch.float32 else t for n, t in mixed.items()}, file, {"format": "pt"})
    policy = stirred(Policy.load(str(tmp_path / "base")))
    types = origin_of(policy.model).types
    written = load_file(saved(policy, tmp_path / "written", tokenizer, types) / WEIGHTS)
    assert {str(tensor.dtype) for tensor in written.values()} == {"torch.float32", "torch.bfloat16"}
    round_as_saved(policy.model, types)
    rounded = load_file(saved(policy, tmp_path / "rounded", tokenizer) / WEIGHTS)
    assert all(torch.equal(tensor, written[name].float()) for name, tensor in rounded.items())


@pytest.mark.parametrize(
    ("dtypes", "expected", "rounds"),
    [
        ({torch.bfloat16}, "bfloat16", True),
        ({torch.float16}, "float16", True),
        ({torch.float32}, "float32", False),
        ({torch.float64}, "float32", False),
        ({torch.bfloat16, torch.float32}, "bfloat16, float32", True),
    ],
)
def test_the_types_of_weights_are_read_from_the_files_not_from_what_the_settings_say(
    tmp_path, dtypes, expected, rounds
):
    (tmp_path / "config.json").write_text('{"dtype": "float16"}', encoding="utf-8")
    weights = {f"w{number}": torch.ones(2, dtype=dtype) for number, dtype in enumerate(sorted(dtypes, key=str))}
    save_file({**weights, "mask": torch.ones(2, dtype=torch.int64)}, tmp_path / WEIGHTS)
    types = WeightTypes.of_files(tmp_path)
    assert (str(types), types.rounds) == (expected, rounds)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}", encoding="utf-8")
    torch.save({**weights, "mask": torch.ones(2, dtype=torch.int64)}, pickled / "pytorch_model.bin")
    assert WeightTypes.of_files(pickled) == types
