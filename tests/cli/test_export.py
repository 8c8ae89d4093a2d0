"""`dpo export`: what it writes is proved, whole or absent; what is wrong is said."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dpo_cli
from dpo_cli.errors import UserError
from dpo_cli.modeling.gguf.vocabulary import Vocabulary
from dpo_cli.pipeline import export_proof
from dpo_cli.pipeline.export_forms import AsGguf
from dpo_cli.pipeline.export_proof import OnPairs, Said, check_alike
from dpo_cli.system.locks import lock_beside, locked
from dpo_cli.system.storage import MANIFEST
from dpo_cli.training.run_folder import RunFolder
from tests.cli.in_process import call
from tests.conftest import build_llama, make_config, write_rows

EXPORT = "export runs/run --merge --to out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer, demo_rows) -> Callable[[str], Path]:
    """Return a folder with a model of some dtype, pairs, a configuration and a finished run of an adapter."""
    made: dict[str, Path] = {}

    def folder_of(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = folder = tmp_path_factory.mktemp(dtype)
            model = build_llama(folder / "model", tokenizer, seed=0)
            AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(model)
            write_rows(folder / "pairs.jsonl", demo_rows[:40])
            settings: dict[str, Any] = {
                "adapter": {"type": "lora", "rank": 4},
                "training": {"learning_rate": 1e-2, "max_steps": 4},
                "output_dir": "runs/run",
            }
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                make_config(folder, Path("model"), Path("pairs.jsonl"), **settings)
                assert call("train run.yaml --quiet") == 0
        return made[dtype]

    return folder_of


@pytest.fixture
def project(tmp_path, monkeypatch, finished, request) -> Path:
    """A copy of it, in which the test is."""
    folder = tmp_path / "project"
    shutil.copytree(finished(getattr(request, "param", "float32")), folder)
    monkeypatch.chdir(folder)
    return folder


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(folder) / "model.safetensors")
    return found


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\d+e[-+]\d+", line)]


def test_figures_are_of_all_held_out_pairs_and_few_of_them_tell_weights_apart(project, monkeypatch):
    """Two more passes, before rounding and after it, need not cost as much as those of both models."""
    passes: list[list[int]] = []
    score = OnPairs.logps

    def counted(proof: OnPairs, *others: Any) -> Any:
        passes.append(proof.batches.pairs.sizes.longest[proof.pairs].tolist())
        return score(proof, *others)

    # First, or this would import it with the other number, and keep that.
    monkeypatch.setattr("dpo_cli.pipeline.export_sources.FEW", 2)
    monkeypatch.setattr(export_proof, "FEW", 2)
    monkeypatch.setattr(OnPairs, "logps", counted)
    found = dpo_cli.export("runs/run", "out", merge=True, dtype="bfloat16")
    every, *between, last = passes
    assert len(every) > 2 and last == every
    assert [sorted(lengths) for lengths in between] == [[min(every), max(every)]] * 2
    assert found["exported"]["pairs"] == len(every)
    assert found["rounding"]["largest"] > 1e-4 > found["exactness"]["largest"]
    # What is beside each other is of the same pairs, and it is said of how many.
    assert found["difference"]["mean"] == pytest.approx(found["rounding"]["mean"], rel=1e-3)
    assert found["pairs compared"] == 2
    assert f"2 of {len(every)} held-out pairs" in Path("out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("project", ["float32", "bfloat16"], indirect=True)
def test_the_model_is_written_in_the_type_of_the_base_and_proved(project, capfd):
    capfd.readouterr()
    assert call(EXPORT) == 0
    printed = capfd.readouterr().out
    dtype = "bfloat16" if "rounding" in printed else "float32"
    assert {str(tensor.dtype) for tensor in weights("out").values()} == {f"torch.{dtype}"}
    assert {str(tensor.dtype) for tensor in weights("model").values()} == {f"torch.{dtype}"}
    largest, mean = numbers(next(line for line in printed.splitlines() if line.startswith("difference")))
    assert 0 <= mean <= largest
    if dtype == "float32":
        assert largest <= 1e-4
    else:
        by_rounding = numbers(next(line for line in printed.splitlines() if line.startswith("rounding")))
        assert largest <= 1.5 * by_rounding[0]
        assert largest > 1e-4, "the rounding of weights has an effect"
    for figure in ("reward accuracy", "reward margin"):
        assert re.search(rf"{figure} +\S+.* +\S+", printed)
    assert (Path("out") / MANIFEST).is_file()
    assert not [path for path in project.iterdir() if path.name.startswith(".")]
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "merged in float32" in card
    assert "PeftModel" not in card
    written = {path.name for path in Path("out").iterdir()}
    # As `final/` of a run without an adapter.
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= written
    assert not {"adapter_config.json", "adapter_model.safetensors"} & written


def test_the_merged_model_gets_from_dpo_eval_what_the_run_ended_with(project, capfd):
    assert call(EXPORT) == 0
    capfd.readouterr()
    assert call("eval run.yaml adapter=null --model out --json -") == 0
    found = json.loads(capfd.readouterr().out)
    rows = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if row["split"] == "eval"][-1]
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(last[name], abs=1e-4)


def test_a_checkpoint_is_exported_with_the_weights_of_its_step(project):
    assert call("export runs/run/checkpoints/step-000002 --merge --to second --quiet") == 0
    assert call("export runs/run/checkpoints/step-000004 --merge --to fourth --quiet") == 0
    assert call("export runs/run/final --merge --to final --quiet") == 0
    second, fourth, final = (weights(name) for name in ("second", "fourth", "final"))
    assert all(torch.equal(fourth[name], final[name]) for name in final)
    assert any(not torch.equal(second[name], final[name]) for name in final)


def test_a_checkpoint_of_a_run_that_is_not_finished_is_exported_too(project):
    shutil.rmtree("runs/run/final")
    assert call("export runs/run/checkpoints/step-000002 --merge --to out --quiet") == 0


def test_a_run_that_goes_on_is_not_to_be_resumed(project, capfd):
    shutil.rmtree("runs/run/final")
    capfd.readouterr()
    with RunFolder(Path("runs/run")).locked():
        assert call(EXPORT) == 2
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(r"the run is not finished.* hint: wait until it has ended; or export a checkpoint", told)


def test_a_base_that_was_moved_is_named_anew(project):
    Path("model").rename("elsewhere")
    assert call(f"{EXPORT} model.name=elsewhere --quiet") == 0


def test_a_run_that_is_exported_from_another_folder_says_where_its_base_is(project, monkeypatch, capfd):
    monkeypatch.chdir(project.parent)
    assert call("export project/runs/run --merge --to out") == 2
    assert re.search(r"as in `model.name=/.*/model`", capfd.readouterr().err)
    named = f"model.name={project}/model data.train={project}/pairs.jsonl"
    assert call(f"export project/runs/run --merge --to out {named} --quiet") == 0


def test_a_run_that_was_moved_is_exported_from_where_it_is(project):
    Path("runs/run").rename("moved")
    assert call("export moved --merge --to out --quiet") == 0


def test_without_held_out_pairs_training_pairs_are_scored(project, capfd):
    assert call("train run.yaml data.eval=null output_dir=runs/all --quiet") == 0
    capfd.readouterr()
    assert call("export runs/all --merge --to out") == 0
    printed = capfd.readouterr()
    assert re.search(r"no pairs are held out: 40 of the training pairs", printed.err)
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "training pairs" in printed.out
    assert "## Figures of training pairs" in card
    assert "held-out" not in printed.out + card.lower().partition("## settings")[0]


@pytest.mark.parametrize(
    "settings",
    [
        "reference=none loss=sft",
        pytest.param("loss.wpo=true", marks=pytest.mark.slow),
        pytest.param("loss=aot", marks=pytest.mark.slow),
        pytest.param("reference=frozen", marks=pytest.mark.slow),
        pytest.param("reference.type=synced reference.every_steps=2", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_any_reference_is_exported(project, settings):
    assert call(f"train run.yaml {settings} output_dir=runs/other --quiet") == 0
    assert call("export runs/other --merge --to out --quiet") == 0


def test_a_run_that_went_on_from_an_adapter_is_exported_with_both(project):
    assert call("train run.yaml adapter.start=runs/run/final output_dir=runs/second --quiet") == 0
    figures = dpo_cli.export("runs/second", "out", merge=True)
    assert figures["difference"]["largest"] <= 1e-4
    # What both learned is in it: no base and no first adapter alone answers so.
    assert figures["adapter"]["rewards/margins"] > 0


@pytest.mark.parametrize("quantize", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("project", ["bfloat16"], indirect=True)
def test_an_adapter_of_a_quantized_base_is_merged_into_the_unquantized_weights(project, quantize, capfd):
    """What that changes is said: far more than the rounding of what is written."""
    assert call(f"train run.yaml model.quantize={quantize} output_dir=runs/few --quiet") == 0
    capfd.readouterr()
    assert call("export runs/few --merge --to out") == 0
    printed = capfd.readouterr().out
    assert f"adapter on {quantize}" in printed
    apart = {line.split()[0]: numbers(line) for line in printed.splitlines() if "nats per token" in line}
    assert apart.keys() == {"difference", "rounding", quantize}
    assert apart["difference"][0] <= 1.5 * apart["rounding"][0]
    assert apart[quantize][1] > apart["rounding"][1]
    for name, merged in weights("out").items():
        assert merged.dtype == torch.bfloat16
        assert torch.equal(merged, weights("model")[name]) == ("proj" not in name)


@pytest.mark.parametrize(
    "settings",
    ["", *(pytest.param(one, marks=pytest.mark.slow) for one in ("model.quantize=nf4", "reference.model=model"))],
)
def test_two_models_are_never_in_memory_at_once(project, monkeypatch, settings):
    """Bytes of all parameters that are alive, at each look: those of a model, and less than half of one beside it."""
    from dpo_cli.modeling import policy
    from dpo_cli.pipeline import export_forms

    assert call(f"train run.yaml {settings} output_dir=runs/other --quiet") == 0
    seen: list[int] = []

    def alive() -> int:
        gc.collect()
        found = {id(one): one.nbytes for one in gc.get_objects() if issubclass(type(one), torch.nn.Parameter)}
        return sum(found.values())

    def looking(load: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **others: Any) -> Any:
            seen.append(alive())
            return load(*arguments, **others)

        return look

    before = alive()
    monkeypatch.setattr(policy, "load_policy", looking(policy.load_policy))
    monkeypatch.setattr(export_forms, "load_complete", looking(export_forms.load_complete))
    assert call("export runs/other --merge --to out --quiet") == 0
    whole = sum(tensor.nbytes for tensor in weights("model").values())
    assert len(seen) == (2 if not settings else 3)
    assert max(seen) - before < whole / 2


@pytest.mark.parametrize("project", ["float32", "bfloat16"], indirect=True)
def test_an_adapter_that_no_run_has_trained_is_proved_on_made_up_tokens(project, capfd, monkeypatch):
    foreign()
    assert call("export runs/run --merge --to ours --quiet") == 0
    capfd.readouterr()
    assert call("export foreign --merge --to out") == 0
    printed = capfd.readouterr()
    assert "no pairs are scored, but made-up tokens" in printed.err
    assert re.search(r"^difference +\d", printed.out, re.M)
    assert "held-out" not in printed.out
    assert all(torch.equal(tensor, weights("ours")[name]) for name, tensor in weights("out").items())
    twice(monkeypatch)
    assert call("export foreign --merge --to again") == 1
    assert not Path("again").exists()


def test_a_device_without_room_is_an_error_that_names_another(project, monkeypatch, capfd):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dpo_cli.modeling.policy.Policy.merge", full)
    capfd.readouterr()
    assert call(EXPORT) == 1
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(r"error: the device has no room .* hint: set the environment variable ACCELERATE_USE_CPU", told)
    assert not Path("out").exists()


def test_two_exports_to_one_folder_do_not_meet(project, capfd):
    with locked(lock_beside(Path("out")), "testing"):
        capfd.readouterr()
        assert call(EXPORT) == 2
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(r"error: another export is writing the same folder: process \d+ .* hint: wait until", told)
    assert not Path("out").exists()


def test_exported_from_python(project):
    found = dpo_cli.export(Path("runs/run"), Path("out"), merge=True)
    assert found["weights"] == "float32"
    assert found["difference"]["largest"] <= 1e-4
    assert found["adapter"].keys() == found["exported"].keys()


def delta_times(patch: pytest.MonkeyPatch, factor: float) -> None:
    """Merge another multiple of the adapter than it is."""
    delta = Linear.get_delta_weight
    patch.setattr(Linear, "get_delta_weight", lambda layer, name: factor * delta(layer, name))


def twice(patch: pytest.MonkeyPatch) -> None:
    """Merge the adapter twice."""
    delta_times(patch, 2)


def scaled(patch: pytest.MonkeyPatch) -> None:
    """Merge with a scale that is a hundredth off, which rounding to bfloat16 alone would hide."""
    delta_times(patch, 1.01)


def transposed(patch: pytest.MonkeyPatch) -> None:
    """Merge square layers transposed."""
    delta = Linear.get_delta_weight

    def other(layer: Any, name: str) -> torch.Tensor:
        found: torch.Tensor = delta(layer, name)
        return found.T if found.shape[0] == found.shape[1] else found

    patch.setattr(Linear, "get_delta_weight", other)


def left_out(patch: pytest.MonkeyPatch) -> None:
    """Leave one layer out."""
    merge, merged = Linear.merge, []

    def all_but_one(layer: Any) -> None:
        merged.append(layer)
        if len(merged) != 3:
            merge(layer)

    patch.setattr(Linear, "merge", all_but_one)


def rounded_twice(patch: pytest.MonkeyPatch) -> None:
    """Round weights to 5 bits before they are rounded."""
    from dpo_cli.modeling.trained import WholeWeights

    write = WholeWeights.write

    def coarse(weights: WholeWeights, *how: Any, **others: Any) -> None:
        for parameter in weights.model.parameters():
            parameter.data = (parameter.data * 32).round() / 32
        write(weights, *how, **others)

    patch.setattr(WholeWeights, "write", coarse)


@pytest.mark.parametrize(
    ("project", "fault"),
    [
        *(("float32", fault) for fault in (twice, transposed, left_out)),
        *(("bfloat16", fault) for fault in (scaled, rounded_twice)),
        *(pytest.param("float32", fault, marks=pytest.mark.slow) for fault in (scaled, rounded_twice)),
        *(pytest.param("bfloat16", fault, marks=pytest.mark.slow) for fault in (twice, transposed, left_out)),
    ],
    indirect=["project"],
)
def test_a_wrong_merge_is_an_error_and_nothing_is_written(project, monkeypatch, capfd, fault):
    fault(monkeypatch)
    before = set(project.iterdir())
    capfd.readouterr()
    assert call(EXPORT) == 1
    error = " ".join(capfd.readouterr().err.split())
    said = "what was written, .*, is not what was exported" if fault is rounded_twice else "the merged model is not"
    assert re.search(rf"error: {said}.*: its log-probabilities differ by", error)
    assert "hint: nothing was written" in error
    assert set(project.iterdir()) == before


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        spoil: What is done to the project before.
        arguments: The command line.
        what: A pattern of the error.
        hint: A pattern of the hint.
        status: The exit status.
    """

    spoil: Callable[[], object]
    arguments: str
    what: str
    hint: str
    status: int = 2


def nothing() -> None:
    """Leave all as it is."""


def other_base() -> None:
    found = weights("model")
    found["model.norm.weight"] += 1e-3
    save_file(found, "model/model.safetensors", metadata={"format": "pt"})


def with_weights(**odd: float) -> Callable[[], object]:
    """Put a number into weights of the model, by their names with `__` for dots."""

    def spoil() -> None:
        found = weights("model")
        for name, number in odd.items():
            found[name.replace("__", ".")].view(-1)[0] = number
        save_file(found, "model/model.safetensors", metadata={"format": "pt"})

    return spoil


def fewer_tokens() -> None:
    found = weights("model")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = found[name][:390].contiguous()
    save_file(found, "model/model.safetensors", metadata={"format": "pt"})
    settings("config", vocab_size=390)


def without_end() -> None:
    settings("config", eos_token_id=None)
    settings("tokenizer_config", eos_token=None)
    Path("model/generation_config.json").unlink()


def settings(file: str, **others: Any) -> None:
    path = Path(f"model/{file}.json")
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **others}), encoding="utf-8")


def changed_base_of_a_copy() -> None:
    assert call("train run.yaml output_dir=runs/own --quiet") == 0
    shutil.copytree("runs/own/final", "copied")
    other_base()


def changed_base_of_a_checkpoint() -> None:
    foreign("checkpoints/step-000002", base_model_name_or_path=str(Path("model").absolute()))
    other_base()


def whole_run() -> None:
    assert call("train run.yaml adapter=null output_dir=runs/whole --quiet") == 0


def foreign(part: str = "final", **settings: Any) -> None:
    """Take an adapter out of its run, and change its settings."""
    shutil.copytree(f"runs/run/{part}", "foreign")
    Path("foreign", MANIFEST).unlink()
    file = Path("foreign/adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **settings}), encoding="utf-8")


def gguf_file(content: bytes) -> Callable[[], object]:
    def spoil() -> None:
        Path("files").mkdir()
        Path("files/my.gguf").write_bytes(content)

    return spoil


def cut(file: str) -> Callable[[], object]:
    return lambda: os.truncate(file, 100)


def gone(name: str) -> Callable[[], object]:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def without_peft() -> None:
    found = importlib.util.find_spec
    PATCH.setattr("importlib.util.find_spec", lambda name, *more: None if name == "peft" else found(name, *more))


PATCH = pytest.MonkeyPatch()

BAD = {
    "no run named": Bad(nothing, "export --merge --to out", r"no run is given", r"give its folder"),
    "two runs named": Bad(nothing, "export runs/run runs --merge --to out", r"several runs", r"one after the other"),
    "a folder to write without its option": Bad(nothing, "export runs/run out", r"`runs/run`, `out`", r"`--to out`"),
    "no target": Bad(nothing, "export runs/run --merge", r"no folder to write", r"--to models/my"),
    "an unknown option": Bad(nothing, f"{EXPORT} --merg", r"`--merg` is not an option", r"--merge"),
    "no such run": Bad(
        nothing, "export runs/rum --merge --to out", r"there is no run, adapter or model `runs/rum`", r"`runs/run`"
    ),
    "an empty name": Bad(nothing, "export '' --merge --to out", r"an empty text", r"a variable"),
    "a file of a model": Bad(
        nothing, "export model/model.safetensors --to out", r"is a file, not the folder", r"did you mean `model`\?"
    ),
    "a file of a run": Bad(nothing, "export runs/run/config.yaml --to out", r"is a file", r"did you mean `runs/run`\?"),
    "a target whose name is too long": Bad(
        nothing, f"export model --to {'a' * 300}", r"the folder to write failed: file name too long", r"shorter"
    ),
    "no such GGUF file": Bad(nothing, "export my.gguf --to out", r"there is no GGUF file `my.gguf`", r"check the path"),
    "a file": Bad(nothing, "export run.yaml --merge --to out", r"is a file, not the folder of a run", r"output_dir"),
    "a folder of something else": Bad(
        lambda: Path("other").mkdir(), "export other --to out", r"`other` is not the folder of a run", r"output_dir"
    ),
    "a folder with a GGUF file": Bad(
        gguf_file(b""), "export files --to out", r"`files` is not the folder .* of a model", r"mean `files/my.gguf`\?"
    ),
    "an empty GGUF file": Bad(
        gguf_file(b""), "export files/my.gguf --to out", r"`files/my.gguf` is empty", r"download or copy it again"
    ),
    "a GGUF file of something else": Bad(
        gguf_file(b"<html>"), "export files/my.gguf --to out", r"is not a GGUF file", r"download or copy it again"
    ),
    "a GGUF file that Git has not fetched": Bad(
        gguf_file(b"version https://git-lfs.github.com/spec/v1\n"), "export files/my.gguf --to out",
        r"`my.gguf` is a Git LFS pointer", r"git lfs pull",
    ),
    "a GGUF file that ends in its header": Bad(
        gguf_file(b"GGUF\3"), "export files/my.gguf --to out", r"the header of the GGUF file cannot be read", r"damaged"
    ),
    "a folder that is called as a GGUF file": Bad(
        lambda: Path("my.gguf").mkdir(), "export my.gguf --to out", r"`my.gguf` is not the folder", r"output_dir"
    ),
    "a model, merged": Bad(nothing, "export model --merge --to out", r"no adapter to merge", r"leave `--merge` out"),
    "a run without an adapter, merged": Bad(
        whole_run, "export runs/whole --merge --to out", r"no adapter to merge", r"leave `--merge` out"
    ),
    "an adapter in a dtype": Bad(
        nothing, "export runs/run --dtype bfloat16 --to out", r"`--dtype` has no effect on an adapter", r"add `--merge`"
    ),
    "an adapter in several files": Bad(
        nothing, "export runs/run --max-shard-size 1MB --to out", r"`--max-shard-size` has no effect", r"add `--merge`"
    ),
    "a size without a unit": Bad(nothing, f"{EXPORT} --max-shard-size 5", r"`5` is not a size", r"`5GB`"),
    "a size of nothing": Bad(nothing, f"{EXPORT} --max-shard-size 0GB", r"`0GB` is not a size", r"`5GB`"),
    "a size in words": Bad(nothing, f"{EXPORT} --max-shard-size 'five GB'", r"`five GB` is not a size", r"`5GB`"),
    "a size beyond all": Bad(nothing, f"{EXPORT} --max-shard-size {'9' * 400}GB", r"9GB` is not a size", r"`5GB`"),
    "a type of GGUF that is none": Bad(nothing, f"{EXPORT} --gguf q4_k_m", r"`q4_k_m` is not a type", r"f16, bf16"),
    "a GGUF file with a dtype": Bad(
        nothing, f"{EXPORT} --gguf f16 --dtype float16", r"`--dtype` has no effect", r"leave it out"
    ),
    "an adapter as a GGUF file": Bad(
        nothing, "export runs/run --gguf f16 --to out", r"adapter by itself is not written as GGUF", r"add `--merge`"
    ),
    "another loss than the run's": Bad(
        nothing, f"{EXPORT} loss.beta=9 training.learning_rate=5",
        r"other settings: `loss.beta` was 0.1 and is 9.0; `training.learning_rate` was", r"these .*: model.name,",
    ),
    "another share that is held out": Bad(
        nothing, f"{EXPORT} data.eval=0.5", r"other settings: `data.eval` was 0.2 and is 0.5", r"leave that out"
    ),
    "weights that are NaN": Bad(
        with_weights(model__norm__weight=float("nan")), "export model --to out",
        r"not all numbers: `model.norm.weight`", r"download the model again",
    ),
    "weights that are infinite": Bad(
        with_weights(model__layers__1__mlp__up_proj__weight=float("inf")), "export model --gguf f32 --to out",
        r"not all numbers: `model.layers.1.mlp.up_proj.weight`", r"download the model again",
    ),
    "a tokenizer of another model": Bad(
        fewer_tokens, "export model --to out", r"tokenizer writes token \d+, but .* ends at 389", r"use the tokenizer"
    ),
    "a GGUF file of a model without an end": Bad(
        without_end, "export model --gguf f16 --to out", r"no token that ends a text", r"without `--gguf`"
    ),
    "a dtype that is none": Bad(nothing, f"{EXPORT} --dtype int8", r"`int8` is not a dtype", r"float32, bfloat16"),
    "a model with settings of a run": Bad(
        nothing, "export model --to out data.eval=0.5", r"overrides a setting of a run", r"leave it out"
    ),
    "a model without its weights": Bad(
        gone("model/model.safetensors"), "export model --to out", r"no model.safetensors", r"incomplete"
    ),
    "a model into itself": Bad(nothing, "export model --to model/out", r"inside what is exported", r"outside"),
    "a target that exists": Bad(lambda: Path("out").mkdir(), EXPORT, r"`out` .* exists already", r"another folder"),
    "a target that is a file": Bad(lambda: Path("out").touch(), EXPORT, r"`out` .* exists already", r"another"),
    "a target in the run": Bad(
        nothing, "export runs/run --merge --to runs/run/merged", r"inside what is exported", r"outside"
    ),
    "a target in the adapter": Bad(
        nothing, "export runs/run --merge --to runs/run/final/merged", r"inside what is exported", r"outside"
    ),
    "a target below a file": Bad(
        nothing, "export runs/run --merge --to pairs.jsonl/out", r"cannot be created: .*is a file", r"another folder"
    ),
    "a run that is not finished": Bad(
        gone("runs/run/final"), EXPORT, r"the run is not finished", r"--resume`; or export .*step-000004"
    ),
    "a damaged adapter": Bad(
        cut("runs/run/final/adapter_model.safetensors"), EXPORT, r"`runs/run/final` is damaged", r"checkpoint"
    ),
    "a checkpoint with a file missing": Bad(
        gone("runs/run/checkpoints/step-000004/adapter_config.json"),
        "export runs/run/checkpoints/step-000004 --merge --to out", r"has no adapter_config.json", r"name the run",
    ),
    "a base that was moved": Bad(
        lambda: Path("model").rename("elsewhere"), EXPORT, r"the base is not there: .*`model`", r"model.name=/"
    ),
    "pairs that were moved": Bad(
        lambda: Path("pairs.jsonl").rename("elsewhere"), EXPORT, r"`pairs.jsonl`", r"name what moved"
    ),
    "another base": Bad(other_base, EXPORT, r"the base `model` \(\S+\) is not the one", r"restore it"),
    "another start adapter": Bad(
        lambda: call("train run.yaml adapter.start=runs/run/final output_dir=runs/second --quiet"),
        "export runs/second --merge --to out adapter.start=runs/run/checkpoints/step-000002",
        r"start adapter `runs/run/checkpoints/step-000002` \(\S+\) is not the one", r"adapter.start=PATH",
    ),
    "no start adapter where the run had one": Bad(
        lambda: call("train run.yaml adapter.start=runs/run/final output_dir=runs/second --quiet"),
        "export runs/second --merge --to out adapter.start=null",
        r"start adapter is not the one", r"adapter.start=PATH",
    ),
    "a wrong setting": Bad(nothing, f"{EXPORT} model.nam=x", r"`model.nam` is not a setting", r"model.name"),
    "an adapter of no run, without its base": Bad(
        lambda: foreign(base_model_name_or_path="/nowhere"), "export foreign --merge --to out",
        r"belongs to `/nowhere`, which does not exist", r"write the whole path",
    ),
    "an adapter of no run, whose base has changed": Bad(
        changed_base_of_a_copy, "export copied --merge --to out",
        r"belongs to another base: `/\S+/model` has other weights", r"trained beside"
    ),
    "a checkpoint of no run, whose base has changed": Bad(
        changed_base_of_a_checkpoint, "export foreign --merge --to out",
        r"belongs to another base: `/\S+/model` has other weights", r"trained beside"
    ),
    "an adapter of no run, of another kind": Bad(
        lambda: foreign(peft_type="LOHA"), "export foreign --merge --to out", r"only LORA is known", r"merge it in PEFT"
    ),
    "an adapter of no run, with settings of one": Bad(
        foreign, "export foreign --merge --to out model.dtype=float32", r"overrides a setting of a run", r"leave it out"
    ),
    "an adapter of no run, into itself": Bad(
        foreign, "export foreign --merge --to foreign/out", r"inside what is exported", r"outside"
    ),
    "without PEFT": Bad(without_peft, EXPORT, r"the package `peft` is not installed", r"dpo-cli\[adapters\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_error_with_a_hint(project, capfd, name):
    case = BAD[name]
    try:
        case.spoil()
        before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
        capfd.readouterr()
        assert call(case.arguments) == case.status
    finally:
        PATCH.undo()
    said = capfd.readouterr().err
    told = " ".join(said.split())
    assert said.count("error: ") == 1, said
    assert re.search(rf"error: .*{case.what}.* hint: .*{case.hint}", told), said
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


@pytest.mark.parametrize("run", ["run", pytest.param("whole", marks=pytest.mark.slow)])
def test_pairs_of_changed_data_are_not_called_held_out(project, demo_rows, capfd, run):
    """They may have been trained on."""
    if run == "whole":
        whole_run()
    write_rows(Path("pairs.jsonl"), demo_rows[20:60])
    capfd.readouterr()
    assert call(f"export runs/{run} --to out") == 0
    printed = capfd.readouterr()
    assert "warning: the data is not what it was when the run began" in " ".join(printed.err.split())
    figures = Path("out/README.md").read_text(encoding="utf-8").partition("## Settings")[0]
    assert "## Figures of other pairs" in figures
    assert "held-out pairs" not in printed.out + figures


def test_data_that_was_moved_is_not_called_changed(project, capfd):
    Path("pairs.jsonl").rename("elsewhere.jsonl")
    assert call("export runs/run --to out data.train=elsewhere.jsonl") == 0
    printed = capfd.readouterr()
    assert "held-out pairs" in printed.out
    assert "is not what it was" not in printed.err


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("SmolLM2-1.7B", "SmolLM2-1.7B"), ("Zürich", "Zürich"), ("-dash", "dash"), (".hidden", "hidden"),
        ("!!!", "model"), ("a$(touch b)\n'", "a-touch-b"), ("x" * 250, "x" * 50),
    ],
)  # fmt: skip
def test_a_gguf_file_has_a_name_that_every_command_takes(name, file):
    assert AsGguf("f16", name, frozenset(), Vocabulary({})).file(Path()) == Path(f"{file}-F16.gguf")


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_log_probabilities_that_are_no_numbers_are_no_proof(odd):
    right, wrong = (Said({}, {0: torch.tensor([0.0, one])}, torch.zeros(0)) for one in (-1.0, odd))
    for ours, theirs in ((right, wrong), (wrong, right), (wrong, wrong)):
        with pytest.raises(UserError, match="differ"):
            check_alike(ours, theirs, "it is another", "out")


def test_several_errors_are_said_at_once(project, capfd):
    Path("out").mkdir()
    Path("pairs.jsonl").unlink()
    assert call("export runs/run --to out --dtype bfloat16 --max-shard-size 5") == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 5
    for problem in ("exists already", "`--dtype` has no effect", "`5` is not a size", "pairs.jsonl"):
        assert problem in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(project, zygote, number, status):
    running = zygote.start("export", "runs/run", "--merge", "--to", "out", cwd=project)
    running.until("scoring the adapter")
    os.kill(running.pid, number)
    assert running.wait().status == status
    assert not list(project.glob("*out*"))


def test_a_full_disk_is_an_error_and_leaves_nothing(project, zygote):
    fault = ("tests.faults.disk_faults:largest_file", {"num_bytes": 20_000})
    ended = zygote.run("export", "runs/run", "--merge", "--to", "out", cwd=project, fault=fault)
    assert ended.status == 1
    assert "error: writing the merged model failed: file too large" in ended.said
    assert "hint: " in ended.said
    assert not list(project.glob("*out*"))
