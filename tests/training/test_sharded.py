"""What several processes save of a model that is sharded over them is resumed by any number of processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.system.storage import verify
from tests.conftest import ROOT, build_llama
from tests.marks import slow_unless
from tests.waiting import PATIENCE

SMALL = {"hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
"""Keys and values have 2 rows: fewer than 3 processes; and nothing is a multiple of 3."""


HALFWAY = "checkpoints/step-000002"


def run_stages(tmp_path, stages):
    file = tmp_path / "stages.json"
    file.write_text(json.dumps([{**asked, "out": str(tmp_path / asked["out"])} for asked in stages]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.sharded_ranks", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


CASES = {
    "untied": {"reference": True},
    "tied": {"background": True, "optimizer": "rmsprop"},
    "8bit": {"optimizer": "adamw_8bit"},
    "adapter": {"adapter": True},
}


@pytest.mark.program
@pytest.mark.parametrize("case", slow_unless(lambda case: case == "untied", CASES))
def test_any_number_of_processes_goes_on_from_what_another_saved(tokenizer, tmp_path, case):
    # Rows of whole blocks of moments.
    sizes = {**SMALL, "hidden_size": 256} if case == "8bit" else SMALL
    model = build_llama(tmp_path / "model", tokenizer, 0, tie_word_embeddings=case == "tied", **sizes)
    asked = {"model": str(model), **CASES[case]}
    begun = [{**asked, "ranks": ranks, "out": f"of-{ranks}"} for ranks in (1, 2, 4)]
    pairs = [(2, 2), (1, 2), (3, 2), (2, 4), (2, 1)]
    resumed = [
        {**asked, "ranks": ranks, "out": f"{of}-{ranks}", "resume": str(tmp_path / f"of-{of}" / HALFWAY)}
        for ranks, of in pairs
    ]
    said = run_stages(tmp_path, begun + resumed)
    assert said.count("the run continues at the right pair") == 4
    assert "processes 2 → 3; shards 2 → 3" in said and "shards 4 → 2" in said
    alone = load_file(tmp_path / "of-1" / "result.safetensors")
    for ranks, of in pairs:
        ended = load_file(tmp_path / f"{of}-{ranks}" / "result.safetensors")
        # What is kept of a part by itself is compared by the weights that it leads to.
        assert_close(ended, {name: alone[name] for name in ended} if case == "8bit" else alone)
    ends = {name: tmp_path / name / "checkpoints" / "step-000004" for name in ("of-2", "2-2", "of-4")}
    assert files(ends["2-2"]) == files(ends["of-2"])
    for name in ("of-2", "of-4"):
        check_folder(ends[name], alone, case)


def check_folder(folder, alone, case):
    """It is sealed, nothing in it is a pickle, every row is there once, and it is read as a model."""
    verify(folder)
    assert not [name for name, content in files(folder).items() if content[:1] == b"\x80"]
    if case == "adapter":
        saved = load_file(folder / "adapter_model.safetensors")
        theirs = {f"base_model.model.{name.replace('.default', '')}": one for name, one in alone.items()}
        assert_close(saved, {name: theirs[name] for name in saved})
        return
    of_weights = [load_file(file) for file in folder.glob("weights-*.safetensors")]
    numbers = sum(one.numel() for tensors in of_weights for one in tensors.values())
    model = load_policy(str(folder))
    assert numbers == sum(weights.numel() for weights in model.parameters())
    assert_close(dict(model.named_parameters()), {name: alone[name] for name, _ in model.named_parameters()})


@pytest.mark.program
def test_whatever_ends_a_process_or_its_writing_leaves_the_older_checkpoint(tokenizer, tmp_path):
    """A disk that is full for one process is one error in both, at once or in the background; a death is none here."""
    model = build_llama(tmp_path / "model", tokenizer, 0, **SMALL)
    asked = {"model": str(model), "ranks": 2}
    cases = [
        {**asked, "out": f"{fault}-{struck}-{background}", "fault": fault, "struck": struck, "background": background}
        for fault in ("limit", "kill")
        for struck in (0, 1)
        for background in (False, True)
    ]
    run_stages(tmp_path, cases)
    for case in cases:
        out = tmp_path / case["out"]
        verify(out / HALFWAY)
        assert not (out / "checkpoints" / "step-000004").exists() and not (out / "result.safetensors").exists()
        if case["fault"] == "limit":
            refused = [(out / f"refused-{rank}.txt").read_text() for rank in (0, 1)]
            assert refused[0] == refused[1]
            who = f"rank {case['struck']} (on {socket.gethostname()})"
            assert refused[0].startswith(f"1 {who}: saving a checkpoint failed: file too large\n"), refused[0]
            assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.program
@pytest.mark.slow
def test_moments_of_8_bits_whose_blocks_would_be_cut_are_refused_on_another_number(tokenizer, tmp_path):
    """A row of 600 numbers has no whole number of blocks of 256."""
    model = build_llama(tmp_path / "model", tokenizer, 0, **{**SMALL, "intermediate_size": 600})
    asked = {"model": str(model), "optimizer": "adamw_8bit"}
    begun = {**asked, "ranks": 2, "out": "begun"}
    on = [
        {**asked, "ranks": ranks, "out": f"on-{ranks}", "resume": str(tmp_path / "begun" / HALFWAY)} for ranks in (2, 3)
    ]
    run_stages(tmp_path, [begun, *on])
    ends = [tmp_path / name / "checkpoints" / "step-000004" for name in ("begun", "on-2")]
    assert files(ends[0]) == files(ends[1])
    refused = [(tmp_path / "on-3" / f"refused-{rank}.txt").read_text() for rank in range(3)]
    assert len(set(refused)) == 1
    assert "proj.weight` have 8 bits" in refused[0] and "resume on 2 processes" in refused[0]


@pytest.mark.program
@pytest.mark.slow
def test_of_machines_that_have_copies_of_each_other_one_writes(tokenizer, tmp_path):
    model = build_llama(tmp_path / "model", tokenizer, 0, **SMALL)
    hybrid = {"model": str(model), "ranks": 4, "hybrid": True, "reference": True}
    resume = {"resume": str(tmp_path / "begun" / HALFWAY)}
    stages = [{**hybrid, "out": "begun"}, {**hybrid, **resume, "out": "again"}]
    run_stages(tmp_path, [*stages, {**stages[0], **resume, "ranks": 2, "hybrid": False, "out": "on-2"}])
    ends = [tmp_path / name / "checkpoints" / "step-000004" for name in ("begun", "again")]
    assert files(ends[0]) == files(ends[1])
    assert sorted(path.name for path in ends[0].glob("weights-*")) == [
        f"weights-{part:05d}-of-00004.safetensors" for part in (1, 2)
    ]
    assert_close(*(load_file(tmp_path / name / "result.safetensors") for name in ("on-2", "begun")))
