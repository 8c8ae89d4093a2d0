"""Runs whose weights are sharded over processes: what they save is whole, and any number goes on from it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.system.storage import verify
from tests.conftest import build_llama, make_config, read_metrics, without_clock, write_rows
from tests.faults.launching import run_ranks
from tests.marks import slow_unless

SETTINGS = {
    "training": {"pairs_per_step": 8, "micro_batch_tokens": 400, "sharding": "full", "learning_rate": 1e-3},
    "checkpoints": {"every_steps": 2, "keep": 100},
    "evaluation": {"every_steps": 2},
}

CASES = {
    "tied": {},
    "untied": {"reference": {"type": "synced", "every_steps": 1, "alpha": 0.5}, "checkpoints": {"background": True}},
    "adapter": {"adapter": {"rank": 3}},
    "nf4": {"adapter": {"rank": 3}, "model": {"quantize": "nf4"}},
}


@pytest.fixture(scope="module", params=slow_unless(lambda case: case == "untied", CASES))
def begun(request, tmp_path_factory, zygote, tokenizer, demo_rows):
    """A run of two processes, to its end."""
    folder, case = tmp_path_factory.mktemp("sharded"), CASES[request.param]
    model = build_llama(folder / "model", tokenizer, 0, tie_word_embeddings=request.param == "tied")
    settings = {
        name: {**SETTINGS.get(name, {}), **case.get(name, {})} if isinstance(case.get(name, {}), dict) else case[name]
        for name in {**SETTINGS, **case}
    }
    file = make_config(folder, model, write_rows(folder / "pairs.jsonl", demo_rows[:40]), "two", **settings)
    env = {"DPO_CACHE_DIR": str(folder / "cache")}
    ended = run_ranks(zygote, 2, "train", "--config", file, env=env)
    assert ended.status == 0, ended.said

    def run(num_ranks, *arguments):
        return run_ranks(zygote, num_ranks, *arguments, env=env)

    return file, folder / "runs" / "two", run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(folder):
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def begun_again(run, name):
    """Return a copy of a run that was broken off after step 2."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > "step-000002":
            shutil.rmtree(checkpoint)
    return copy


def test_every_checkpoint_is_whole_and_holds_no_pickle(begun):
    _, run, _ = begun
    saved = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-000002", "step-000004"]
    for folder in (*saved, run / "final"):
        verify(folder)
        assert not [name for name, content in contents(folder).items() if content[:1] == b"\x80"]
    assert (saved[0] / "shards.json").is_file() and not (run / "final" / "shards.json").exists()


def test_the_same_number_of_processes_ends_with_the_same_bytes(begun):
    file, run, dpo = begun
    copy = begun_again(run, "same")
    ended = dpo(2, "train", "--config", file, f"output_dir={copy}", "--resume")
    assert ended.status == 0 and "resuming after step 2" in ended.said, ended.said
    assert "the run continues" not in ended.said
    for name in ("final", "checkpoints/step-000004"):
        ours, theirs = contents(copy / name), contents(run / name)
        # The card names the folder.
        assert {n: b for n, b in ours.items() if n not in ("README.md", "manifest.json")} == {
            n: b for n, b in theirs.items() if n not in ("README.md", "manifest.json")
        }
    assert without_clock(read_metrics(copy)) == without_clock(read_metrics(run))


@pytest.mark.parametrize(("num_ranks", "sharding"), [(1, "none"), (3, "full"), (2, "none")])
def test_another_number_of_processes_goes_on_and_says_so(begun, num_ranks, sharding):
    file, run, dpo = begun
    copy = begun_again(run, f"on-{num_ranks}-{sharding}")
    how = (f"output_dir={copy}", f"training.sharding={sharding}", "--resume")
    ended = dpo(num_ranks, "train", "--config", file, *how)
    assert ended.status == 0, ended.said
    told = f"shards 2 → {num_ranks if sharding == 'full' else 1}"
    assert "the run continues at the right pair" in ended.said and told in ended.said
    ours, theirs = weights_of(copy / "final"), weights_of(run / "final")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    losses = [[row["loss"] for row in read_metrics(folder)] for folder in (copy, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_checkpoint_is_scored_as_a_model(begun, tmp_path, num_ranks):
    file, run, dpo = begun
    checkpoint = run / "checkpoints" / "step-000002"
    ended = dpo(num_ranks, "eval", "--config", file, "--model", checkpoint, "--json", tmp_path / "figures.json")
    assert ended.status == 0, ended.said
    figures = json.loads((tmp_path / "figures.json").read_text())
    row = next(row for row in read_metrics(run, "eval") if row["step"] == 2)
    names = ["loss", "rewards/margins", "logps/chosen", "logps/rejected"]
    if "synced" not in file.read_text():
        assert [figures[name] for name in names] == pytest.approx([row[name] for name in names], rel=1e-4, abs=1e-4)


def test_a_checkpoint_is_exported_as_a_model(begun, tmp_path):
    _, run, dpo = begun
    checkpoint = run / "checkpoints" / "step-000002"
    if (checkpoint / "adapter_config.json").exists():
        pytest.skip("it is an adapter's folder already")
    ended = dpo(1, "export", checkpoint, "--dtype", "float32", "--to", tmp_path / "model")
    assert ended.status == 0, ended.said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    saved = dict(model.named_parameters())
    parts = [load_file(path) for path in sorted(checkpoint.glob("weights-*.safetensors"))]
    for name in parts[0]:
        assert torch.equal(torch.cat([part[name] for part in parts]), saved[name]), name


def test_a_checkpoint_is_exported_as_a_gguf_file_or_an_adapter(begun, tmp_path):
    """By one process, of what two have saved; the proof compares it with the run's own model."""
    _, run, dpo = begun
    checkpoint = run / "checkpoints" / "step-000002"
    is_adapter = (checkpoint / "adapter_config.json").exists()
    forms = {"gguf": ("--gguf", "f16", *(["--merge"] if is_adapter else []))}
    if is_adapter:
        forms |= {"adapter": (), "merged": ("--merge",)}
    for name, options in forms.items():
        ended = dpo(1, "export", checkpoint, *options, "--to", tmp_path / name)
        assert ended.status == 0, ended.said
        found = json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))["export"]
        assert found["exactness"]["largest"] <= 1e-4
        assert found["model" if not is_adapter else "adapter"].keys() == found["exported"].keys()
