"""What `dpo export` has written is refused where it is not what was exported, and the error says what differs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import dpo_cli
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.adapted import AdapterWeights
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.trained import WholeWeights
from dpo_cli.pipeline.export_proof import OnTokens
from dpo_cli.reporting.console import Console
from dpo_cli.system.storage import MANIFEST, read_manifest
from tests.builders import merge_times, save_adapter
from tests.cli.in_process import call
from tests.conftest import build_llama

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any, tokenizer: Any) -> Path:
    """A folder with a model whose head is its embedding, one whose head is not, and an adapter of the latter."""
    folder: Path = tmp_path_factory.mktemp("models")
    scaled = {"rope_parameters": LLAMA_3, "max_position_embeddings": 16384}
    for name, tied in (("tied", True), ("untied", False)):
        build_llama(folder / name, tokenizer, seed=0, tie_word_embeddings=tied, **scaled)
        (folder / name / "LICENSE").write_text("Do what you like.\n", encoding="utf-8")
    save_adapter(folder / "untied", folder / "adapter")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(
        folder / "gpt2"
    )
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture
def project(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return models


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(file.read_text(encoding="utf-8"))
    change(said)
    file.write_text(json.dumps(said), encoding="utf-8")


def settings(**others: Any) -> Callable[[Path], None]:
    return lambda folder: changed(folder / "config.json", lambda said: said.update(others))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors", {"format": "pt"})

    return spoil


LAYER = "model.layers.1"


def transposed(found: dict[str, torch.Tensor]) -> None:
    found[f"{LAYER}.self_attn.o_proj.weight"] = found[f"{LAYER}.self_attn.o_proj.weight"].T


def swapped(found: dict[str, torch.Tensor]) -> None:
    names = [f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up")]
    found[names[0]], found[names[1]] = found[names[1]], found[names[0]]


def without_norm(found: dict[str, torch.Tensor]) -> None:
    del found[f"{LAYER}.input_layernorm.weight"]


def norm_of_ones(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"] = found["model.norm.weight"] + 0.01


def far_positions(found: dict[str, torch.Tensor]) -> None:
    found["transformer.wpe.weight"][300:] *= -1


def with_head(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].flip(0)


def tied(folder: Path) -> None:
    settings(tie_word_embeddings=True)(folder)
    weights(lambda found: found.pop("lm_head.weight"))(folder)


def end_of_generation(folder: Path) -> None:
    changed(folder / "generation_config.json", lambda said: said.update(eos_token_id=5))


def no_end_of_generation(folder: Path) -> None:
    changed(folder / "generation_config.json", lambda said: said.update(eos_token_id=[2, 9]))


def other_end(folder: Path) -> None:
    changed(folder / "tokenizer_config.json", lambda said: said.update(eos_token="a"))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    changed(folder / "tokenizer_config.json", lambda said: said.pop("chat_template", None))


def other_merges(folder: Path) -> None:
    changed(folder / "tokenizer.json", lambda said: said["model"]["merges"].reverse())


def lower_case(folder: Path) -> None:
    changed(folder / "tokenizer.json", lambda said: said.update(normalizer={"type": "Lowercase"}))


def spoil_what_is_written(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    """Spoil a folder when it was written and compared with what is in memory."""
    for kind in (WholeWeights, AdapterWeights):

        def spoilt(weights: Any, folder: Path, *, check: Any = kind.check_written, **others: Any) -> None:
            check(weights, folder, **others)
            spoil(folder)

        monkeypatch.setattr(kind, "check_written", spoilt)


def check_refused(source: Path, said: str, capfd: Any) -> None:
    """Export something, and check that it is refused and that nothing is left."""
    assert call(f"export {source} --to out --quiet") == 1
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(rf"error: .*{said}.* hint: nothing was written", told), told
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("model", "spoil", "said"),
    [
        ("tied", weights(transposed), "log-probabilities differ by"),
        ("tied", weights(swapped), "log-probabilities differ by"),
        ("tied", weights(without_norm), "weights of 1 parameter are missing"),
        ("tied", weights(norm_of_ones), "log-probabilities differ by"),
        ("tied", weights(with_head), "ties lm_head.weight to other weights"),
        ("untied", tied, "log-probabilities differ by"),
        ("tied", settings(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), "differ by"),
        ("tied", settings(rope_parameters={**LLAMA_3, "factor": 4.0}), "differ by"),
        ("gpt2", weights(far_positions), "differ by .* where positions are far apart"),
        ("tied", settings(rms_norm_eps=1e-2), "log-probabilities differ by"),
        ("tied", settings(num_hidden_layers=1), "are not part of"),
        ("tied", settings(max_position_embeddings=32), "texts of another length"),
        ("tied", end_of_generation, "texts end at the tokens .*, and in what was written at .*5"),
        ("tied", no_end_of_generation, "texts end at the tokens"),
        ("tied", other_end, "the eos token is"),
        ("tied", other_template, "the chat template `default` is another"),
        ("tied", no_template, "the chat template `default` is another"),
        ("tied", other_merges, "the tokens of .* texts are others"),
        ("tied", lower_case, "the tokens of .* texts are others"),
    ],
)
def test_a_model_that_was_not_written_as_it_is_is_refused(
    project: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, model: str, spoil: Callable[[Path], None], said: str
) -> None:
    spoil_what_is_written(monkeypatch, spoil)
    check_refused(project / model, said, capfd)


@pytest.mark.parametrize(
    ("model", "kind"), [("tied", "f16"), pytest.param("tied", "f32", marks=pytest.mark.slow), ("untied", "q8_0")]
)
def test_a_gguf_file_is_written_proved_and_read_again(project: Path, capfd: Any, model: str, kind: str) -> None:
    found = dpo_cli.export(project / model, "out", gguf=kind)
    assert found["weights"] == kind
    assert found["exactness"]["largest"] <= 1e-4
    assert (found["rounding"]["largest"] > 0) == (kind != "f32")
    assert found["answers"]["compared"] == 10
    (file,) = Path("out").glob("*.gguf")
    assert file.name == f"{model}-{kind.upper()}.gguf"
    assert Path("out/Modelfile").read_text(encoding="utf-8").startswith(f"FROM ./{file.name}\n")
    assert {path.name for path in Path("out").iterdir()} == {file.name, "Modelfile", "README.md", "LICENSE", MANIFEST}
    # What was written is a model that is exported in turn, and nothing is lost on the way.
    again = dpo_cli.export(file, "again")
    assert again["rounding"]["largest"] == 0 == again["difference"]["largest"]


def test_weights_that_rounding_leaves_as_they_are_are_not_asked_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    right = OnTokens.logps

    def counted(proof: OnTokens, policy: Policy, what: str) -> Any:
        asked.append(what)
        return right(proof, policy, what)

    monkeypatch.setattr(OnTokens, "logps", counted)
    dpo_cli.export(project / "tied", "out", dtype="bfloat16")
    for to, form in (("folder", {}), ("file", {"gguf": "bf16"})):
        asked.clear()
        assert dpo_cli.export("out", to, **form)["rounding"]["largest"] == 0
        assert asked == ["the model", "what was written"]


def test_answers_that_rounding_changes_are_told_from_those_of_the_rounded_weights(project: Path, capfd: Any) -> None:
    found = dpo_cli.export(project / "tied", "out", gguf="q4_0", console=Console())
    answers = found["answers"]
    assert answers["compared"] == answers["as rounded"] == 10 > answers["alike"]
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("answers"))
    told = f"10 of 10 greedy answers of the rounded weights, {answers['alike']} of the model"
    assert line.endswith(f"{told}: rounding puts other tokens first, by at most {answers['gap']:.1e} nats"), line


@pytest.fixture
def inexact(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of a model that makes more than 1e-4 nats of the last digits of float32: of large weights."""
    build_llama(tmp_path / "model", tokenizer, seed=0, initializer_range=1.0, num_hidden_layers=8)
    monkeypatch.chdir(tmp_path)
    return save_adapter(tmp_path / "model", tmp_path / "adapter")


@pytest.fixture
def experts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of a model with experts, between which its last router chooses by the last digits of float32."""
    model = build("qwen3_moe", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05 if "layers.1.mlp" in name else 0.1)
        if name.endswith("layers.1.mlp.gate.weight"):
            weight.data[1:] = weight.data[0] + 1e-7 * torch.randn_like(weight.data[1:])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return save_adapter(tmp_path / "model", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("adapter", ["inexact", "experts"])
def test_a_model_whose_own_sums_are_less_exact_is_merged(request: pytest.FixtureRequest, adapter: str) -> None:
    found = dpo_cli.export(request.getfixturevalue(adapter), "out", merge=True)
    assert 1e-4 < found["difference"]["largest"] < 1e-2
    assert found["exactness"]["largest"] <= 1e-4


@pytest.mark.parametrize("adapter", ["inexact", "experts"])
def test_a_fault_in_merging_is_not_taken_for_sums_in_another_order(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    source = request.getfixturevalue(adapter)
    merge_times(1.001, monkeypatch)
    with pytest.raises(UserError, match="the merged model is not the adapter's"):
        dpo_cli.export(source, "out", merge=True)
    assert not Path("out").exists()


def slightly_other(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"] *= 1.00001


def test_a_fault_in_a_file_is_not_taken_for_sums_in_another_order(
    inexact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is the same numbers, however exact sums of them are."""
    spoil_what_is_written(monkeypatch, weights(slightly_other))
    with pytest.raises(UserError, match="as transformers reads it, is not what was exported: its log-probabilities"):
        dpo_cli.export(inexact, "out", merge=True)
    assert not Path("out").exists()


def test_answers_that_merging_changes_are_told_from_those_of_rounded_weights(
    project: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is rounded here."""
    monkeypatch.setattr("dpo_cli.pipeline.export_proof.EXACT", 1e3)
    merge_times(3.0, monkeypatch)
    answers = dpo_cli.export(project / "adapter", "out", merge=True, console=Console())["answers"]
    assert answers["compared"] == answers["as rounded"] == 10 > answers["alike"]
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("answers"))
    told = f"10 of 10 greedy answers of the merged model, {answers['alike']} of the adapter"
    assert line.endswith(f"{told}: merging puts other tokens first, by at most {answers['gap']:.1e} nats"), line


def test_a_gguf_file_that_is_read_for_its_proof_leaves_nothing_in_the_cache_or_elsewhere(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cache", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    dpo_cli.export(project / "tied", "out", gguf="f16")
    assert not list((tmp_path / "scratch").iterdir())
    assert not (tmp_path / "cache" / "models").exists()


def test_a_reader_that_is_not_installed_is_named(project: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.pipeline.export.available", lambda: False)
    found = dpo_cli.export(project / "tied", "out", gguf="f16", console=Console())
    told = " ".join(capfd.readouterr().err.split())
    assert "llama.cpp did not read the file: `pip install 'dpo-cli[llama]'` installs its package" in told
    assert "llama.cpp" not in found


def other_alpha(folder: Path) -> None:
    changed(folder / "adapter_config.json", lambda said: said.update(lora_alpha=64))


def other_adapter(folder: Path) -> None:
    found = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in found if "lora_B" in name)
    save_file({**found, name: found[name] * 1.01}, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_alpha, "as PEFT reads it, is not what was exported: its log-probabilities differ"),
        (other_adapter, "log-probabilities differ"),
        (other_template, "the chat template `default` is another"),
        (other_end, "the eos token is"),
    ],
)
def test_an_adapter_that_was_not_written_as_it_is_is_refused(
    project: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], said: str
) -> None:
    spoil_what_is_written(monkeypatch, spoil)
    check_refused(project / "adapter", said, capfd)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_written_for_peft_with_tokenizer_template_and_licence(project: Path, tokenizer: Any) -> None:
    assert call(f"export {project}/adapter --to out") == 0
    ours, theirs = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project / "untied"), folder)
        for folder in ("out", project / "adapter")
    )
    tokens = torch.arange(40)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    read = AutoTokenizer.from_pretrained("out")
    assert read.chat_template == tokenizer.chat_template and read.get_vocab() == tokenizer.get_vocab()
    assert Path("out/LICENSE").read_text(encoding="utf-8") == "Do what you like.\n"
    said = json.loads(Path("out/adapter_config.json").read_text(encoding="utf-8"))
    assert said["base_model_name_or_path"] == str(project / "untied")
    assert not Path("out/model.safetensors").exists()


def test_the_manifest_says_how_exact_it_is(project: Path) -> None:
    found = dpo_cli.export(project / "tied", "out", dtype="bfloat16")
    assert read_manifest(Path("out"))["export"] == json.loads(json.dumps(found))
    assert found["rounding"]["largest"] > 1e-4 > found["exactness"]["largest"]


@pytest.mark.parametrize(("size", "files"), [("20KB", 6), ("20KiB", 6), ("1.5MB", 1)])
def test_weights_are_split_among_files_with_an_index(project: Path, size: str, files: int) -> None:
    assert call(f"export {project}/untied --max-shard-size {size} --to out") == 0
    written = sorted(Path("out").glob("*.safetensors"))
    limit = {"20KB": 20_000, "20KiB": 20_480, "1.5MB": 1_500_000}[size]
    parts = [load_file(file) for file in written]
    assert all(sum(t.nbytes for t in part.values()) <= limit or len(part) == 1 for part in parts)
    assert (len(written) > 1) == Path("out/model.safetensors.index.json").exists() == (files > 1)
    whole = load_file(project / "untied" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.items())
