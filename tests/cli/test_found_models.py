"""Whole runs on models as they are found: what they ask for beside logits, what lies in their folders."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, build
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from dpo_cli.config.loading import load_config
from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.saved_weights import SavedWeights
from dpo_cli.modeling.folders.saving import prove_saving, saved_model
from tests.cli.test_two_processes import torchrun
from tests.conftest import make_config
from tests.marks import slow_unless

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def train(forked_dpo: Any, tmp_path: Path, folder: Path, pairs_file: Path) -> Run:
    """Train what lies in the folder for two steps."""

    def run(*arguments: str) -> Any:
        config = make_config(tmp_path, folder, pairs_file, training={"max_steps": 2}, data={"eval": 0.1})
        return forked_dpo("train", "--config", config, *arguments)

    return run


@pytest.fixture
def put(folder: Path, tokenizer: Any) -> Callable[..., None]:
    """Put a tiny model of a kind into the folder, and change its config.json."""

    def put(kind: str, **asked: Any) -> None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        build(kind, vocab_size=len(tokenizer), max_position_embeddings=512, **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))

    return put


def final(tmp_path: Path) -> Path:
    return tmp_path / "runs/run/final"


ASKED = [
    ("llama", {"output_attentions": True}),
    ("llama", {"output_hidden_states": True, "return_dict": False}),
    ("gpt2", {"return_dict": False, "use_cache": True, "output_hidden_states": True}),
    ("mixtral", {"output_router_logits": True}),
    ("qwen3_moe", {"output_router_logits": True, "output_attentions": True}),
    ("olmoe", {"output_router_logits": True, "return_dict": False}),
]


@pytest.mark.parametrize(("kind", "asked"), slow_unless(lambda case: case[0] in ("gpt2", "qwen3_moe"), ASKED), ids=str)
def test_what_settings_ask_for_beside_the_logits_changes_no_weight_and_is_saved_as_it_was(
    train, put, folder, tmp_path, kind, asked
):
    put(kind)
    plain = train()
    assert plain.returncode == 0, plain.stderr
    weights = load_file(final(tmp_path) / "model.safetensors")
    shutil.rmtree(folder)
    put(kind, **asked)
    result = train("--overwrite")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    settings = json.loads((final(tmp_path) / "config.json").read_text())
    assert {name: settings[name] for name in asked} == asked
    for name, tensor in load_file(final(tmp_path) / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_a_run_balances_experts_logs_it_and_goes_on_under_the_same_coefficient_alone(train, put, tmp_path):
    put("olmoe")
    settings = ["training.gradient_checkpointing=true", "training.micro_batch_tokens=1"]
    result = train("loss.router_aux=0.5", *settings)
    assert result.returncode == 0, result.stderr
    assert "router_aux 0.5" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["router_aux"] > 1 for row in rows if row["split"] == "train"] == [True, True]
    assert not any("router_aux" in row for row in rows if row["split"] == "eval")
    weights = load_file(final(tmp_path) / "model.safetensors")
    shutil.rmtree(final(tmp_path))
    result = train("--resume", *settings)
    assert result.returncode == 2
    assert "`loss.router_aux` was 0.5 and is 0.0" in result.stderr
    assert load_config(tmp_path / "runs/run/config.yaml", []).objective.router_aux == 0.5
    result = train("--resume", "loss.router_aux=0.5", *settings)
    assert result.returncode == 0, result.stderr
    for name, tensor in load_file(final(tmp_path) / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    shutil.rmtree(tmp_path / "runs")
    result = train(*settings)
    assert result.returncode == 0, result.stderr
    other = load_file(final(tmp_path) / "model.safetensors")
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("llama", "LlamaForCausalLM has no experts"),
        ("deepseek_v3", "transformers has no load-balancing loss for DeepseekV3ForCausalLM"),
    ],
)
def test_experts_to_balance_that_a_model_lacks_are_an_error_before_it_is_loaded(
    train, put, folder, tmp_path, kind, what
):
    put(kind)
    (folder / "model.safetensors").write_bytes(b"no weights")
    for arguments in (["--dry-run"], []):
        result = train("loss.router_aux=0.01", *arguments)
        assert result.returncode == 2
        assert what in result.stderr
        assert "in `loss.router_aux`" in result.stderr
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "lfm2", "mamba"])
def test_a_run_shows_no_word_of_libraries(train, put, kind):
    """Experts whose products fake tensors do not know; kernels that are not installed."""
    put(kind)
    for arguments in (["--dry-run"], []):
        result = train(*arguments)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        ours = ("using the padded layout", "Try: ", "`training.learning_rate`")
        said = [line for line in result.stderr.splitlines() if not any(words in line for words in ours)]
        assert not [line for line in said if "warning" in line or "_mm" in line or "transformers]" in line]


def test_files_that_belong_to_a_model_come_along_and_others_do_not(train, put, folder, tmp_path):
    put("llama")
    belonging = {
        "preprocessor_config.json": "{}", "processor_config.json": "{}", "tokenizer.model": "words", "LICENSE": "free",
        "special_tokens_map.json": "{}", "USE_POLICY.md": "be kind", "vocab.json": "{}", "merges.txt": "",
    }  # fmt: skip
    others = ["trainer_state.json", "training_args.bin", "README.md", "own.py", "eval.txt", "model.onnx"]
    for name, content in {**belonging, **dict.fromkeys(others, "other")}.items():
        (folder / name).write_text(content)
    result = train()
    assert result.returncode == 0, result.stderr
    (checkpoint,) = (tmp_path / "runs/run/checkpoints").iterdir()
    for saved in (final(tmp_path), checkpoint):
        assert {name: (saved / name).read_text() for name in belonging} == belonging
        assert not [name for name in others if name != "README.md" and (saved / name).exists()]
    assert (final(tmp_path) / "README.md").read_text() != "other"


def test_a_tokenizer_is_saved_as_it_came_and_older_programs_know_its_class(train, put, folder, tmp_path):
    put("llama")
    result = train()
    assert result.returncode == 0, result.stderr
    settings = json.loads((final(tmp_path) / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    result = train("--overwrite")
    assert result.returncode == 0, result.stderr
    settings = json.loads((final(tmp_path) / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizerFast"
    assert (final(tmp_path) / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("inline", [True, False])
def test_the_template_of_the_run_is_saved_where_the_tokenizers_own_was(train, put, folder, tmp_path, inline):
    put("llama")
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if inline:
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template.read_text()}))
        template.unlink()
    (tmp_path / "own.jinja").write_text("{# own #}" + AutoTokenizer.from_pretrained(folder).chat_template)
    for number, named in enumerate((str(tmp_path / "own.jinja"), "plain")):
        result = train(f"model.chat_template={named}", *["--overwrite"] * number)
        assert result.returncode == 0, result.stderr
        expected = None if named == "plain" else (tmp_path / "own.jinja").read_text()
        assert AutoTokenizer.from_pretrained(final(tmp_path)).chat_template == expected
        settings = json.loads((final(tmp_path) / "tokenizer_config.json").read_text())
        assert settings.get("chat_template") == (expected if inline else None)


def test_what_is_saved_may_be_read_as_any_new_file(train, put, folder, tmp_path):
    put("llama")
    result = train()
    assert result.returncode == 0, result.stderr
    expected = (folder / "config.json").stat().st_mode
    assert {file.stat().st_mode for file in final(tmp_path).iterdir()} == {expected}


def test_a_head_tied_by_the_settings_alone_is_trained_untied_and_resumed(train, put, folder, tmp_path):
    put("mistral", tie_word_embeddings=True)
    result = train()
    assert result.returncode == 0, result.stderr
    assert "what is saved says `tie_word_embeddings: false`" in result.stderr
    assert json.loads((final(tmp_path) / "config.json").read_text())["tie_word_embeddings"] is False
    whole = load_file(final(tmp_path) / "model.safetensors")
    assert "lm_head.weight" in whole
    model = AutoModelForCausalLM.from_pretrained(final(tmp_path))
    assert torch.equal(model.lm_head.weight, whole["lm_head.weight"])
    shutil.rmtree(final(tmp_path))
    again = train("--resume")
    assert again.returncode == 0, again.stderr
    for name, tensor in load_file(final(tmp_path) / "model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name


MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(status)
"""
"""Runs a command, and prints the most memory that it held, in KiB, and the seconds that it computed."""

LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "layer_types": None, "head_dim": 128, "attention_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Eight billion parameters."""


@pytest.fixture
def large(put: Callable[..., None], folder: Path) -> Callable[[int], None]:
    """Put a model into the folder whose weights of 16 bits are a header and a hole."""

    def put_large(factor: int) -> None:
        put("llama", **{**LARGE, "num_hidden_layers": 32 * factor})
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        header, end = {}, 0
        for name, tensor in model.state_dict().items():
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)

    return put_large


@pytest.mark.parametrize("factor", [4])
@pytest.mark.parametrize(
    "command", slow_unless(lambda command: "dry" not in command, ["train", "train --dry-run", "eval --model"])
)
def test_what_cannot_fit_into_memory_is_refused_in_seconds_before_it_is_loaded(
    tmp_path, large, folder, tiny_llama, pairs_file, command, factor
):
    """120 GB in float32, whatever machine this is; 450 GB with gradients and moments."""
    large(factor)
    first, *others = command.split()
    trained = tiny_llama if first == "eval" else folder
    config = make_config(tmp_path, trained, pairs_file, data={"eval": 0.1})
    others += [str(folder)] if first == "eval" else []
    measured = [sys.executable, "-c", MEASURED, sys.executable, "-m", "dpo_cli", first, "--config", config, *others]
    result = subprocess.run(list(map(str, measured)), capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    kibibytes, seconds = map(float, result.stdout.splitlines()[-1].split())
    assert kibibytes < 1.5 * 2**20
    assert seconds < 60
    assert "Traceback" not in result.stderr
    if first == "eval":
        assert re.search(r"its weights take 1\d\d\.\d GiB in float32, but [\d.]+ GiB of memory are free", result.stderr)
        assert "choose a smaller model" in result.stderr
    else:
        assert re.search(r"training needs at least \d{3}\.\d\d GiB of memory, but [\d.]+ GiB are free", result.stderr)
        for part in ("weights", "gradients", "optimizer"):
            assert f"{part} " in result.stderr
        # 29 billion weights in 4 bits take 15 GiB, which some machines have.
        if float(re.search(r"but ([\d.]+) GiB are free", result.stderr)[1]) > 15 and "hint: set" in result.stderr:
            assert re.search(r"hint: set `adapter: lora` and `model.quantize: nf4` \([\d.]+ GiB\)\n", result.stderr)
        else:
            assert re.search(r"choose a model of at most [\d.]+ billion parameters", result.stderr)
            assert "adafactor" in result.stderr


@pytest.mark.parametrize("command", ["train reference.model={}", "eval --model {}"])
def test_a_model_that_reads_other_tokens_is_refused_with_the_first_ids_that_differ(
    forked_dpo, tmp_path, tiny_llama, pairs_file, command
):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    file = other / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    first, second = (next(word for word, place in vocabulary.items() if place == i) for i in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    file.write_text(json.dumps(words))
    config = make_config(tmp_path, tiny_llama, pairs_file, data={"eval": 0.1})
    first_word, *others = command.format(other).split()
    result = forked_dpo(first_word, "--config", config, *others)
    assert result.returncode == 2, result.stderr
    assert "2 ids differ" in result.stderr
    assert "id 300 is" in result.stderr
    assert "the same tokenizer" in result.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    assert forked_dpo(first_word, "--config", config, *others).returncode == 0


@pytest.mark.slow
def test_a_model_that_reads_images_as_well_trains_its_text_on_two_processes(
    put, folder, tmp_path, tokenizer, pairs_file
):
    put("llama")
    text = {**SMALL, "vocab_size": len(tokenizer), "head_dim": 8, "max_position_embeddings": 512}
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**seen, "image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        file.unlink()
    model.save_pretrained(folder)
    config = make_config(tmp_path, folder, pairs_file, training={"max_steps": 2}, data={"eval": 0.1})
    result = torchrun("train", "--config", config, "checkpoints.every_steps=1")
    assert result.returncode == 0, result.stderr
    before, after = load_file(folder / "model.safetensors"), load_file(final(tmp_path) / "model.safetensors")
    assert before.keys() == after.keys()
    unmoved = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert unmoved == {name for name in before if "vision" in name or "projector" in name}


def test_what_could_not_be_saved_is_found_before_step_1(tiny_llama, tokenizer):
    model = load_policy(str(tiny_llama))
    assert "can be saved" in prove_saving(model, tokenizer)
    model.generation_config.max_new_tokens = -5
    with pytest.raises(UserError, match="could not be saved"):
        prove_saving(model, tokenizer)
    model = load_policy(str(tiny_llama))
    model.config.intermediate_size = 48
    with pytest.raises(UserError, match="shape"):
        prove_saving(model, tokenizer)
    model = load_policy(str(tiny_llama))
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="not part of"):
        prove_saving(model, tokenizer)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_what_the_disk_did_not_keep_is_found_when_it_is_saved(tmp_path, put, folder, tokenizer, kind):
    put(kind)
    model = load_policy(str(folder))
    assert "can be saved" in prove_saving(model, tokenizer)
    with saved_model(tmp_path / "saved", model, tokenizer, "saving") as temporary:
        SavedWeights(model).check(temporary)
    weights = load_file(tmp_path / "saved/model.safetensors")
    first, *others = sorted(weights)
    for spoilt in ({**weights, first: weights[first] + 1e-6}, {name: weights[name] for name in others}):
        save_file(spoilt, tmp_path / "saved/model.safetensors")
        with pytest.raises(UserError, match=f"`{re.escape(first)}` was not saved"):
            SavedWeights(model).check(tmp_path / "saved")


@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_a_model_of_zeros_has_nothing_to_learn_with(train, put, folder, layout):
    put("llama")
    weights = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    result = train(f"training.layout={layout}")
    assert result.returncode == 2, result.stderr
    assert "no weight of the model has a gradient" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("layout", slow_unless(lambda layout: layout == "auto", ["auto", "padded"]))
@pytest.mark.parametrize(
    ("kind", "asked"),
    [("mixtral", {"num_experts_per_tok": 10}), ("cohere", {"logit_scale": None}), ("deepseek_v3", {"n_group": 3})],
    ids=str,
)
def test_a_model_that_fails_on_its_first_pairs_is_told_by_what_it_says(train, put, kind, asked, layout):
    put(kind, **asked)
    result = train(f"training.layout={layout}")
    assert result.returncode == 2, result.stderr
    assert "the model fails on the first pairs" in result.stderr
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_a_model_says_of_generation_is_saved_with_what_no_library_knows(train, put, folder, tmp_path):
    put("llama")
    file = folder / "generation_config.json"
    said = {**json.loads(file.read_text()), "chat_format": "chatml", "repetition_penalty": 1.1, "suppress_tokens": None}
    file.write_text(json.dumps(said))
    result = train()
    assert result.returncode == 0, result.stderr
    # It would make older versions of transformers look into config.json instead.
    del said["_from_model_config"]
    found = json.loads((final(tmp_path) / "generation_config.json").read_text())
    assert found == said
