"""Memory runs out at every stage of a run: one error that says what to change, and what was saved is whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_cli.modeling.scorer import Scorer
from dpo_cli.system.storage import verify
from tests.cli.in_process import call
from tests.conftest import read_metrics, without_clock
from tests.faults.launching import run_ranks, start_ranks
from tests.faults.strokes import STRUCK, strike
from tests.marks import slow_unless

OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
STAGES = {
    "the proof": ("dpo_cli.modeling.proof:_answers", 1, "while the layout of the pairs was proved"),
    "the reference": ("dpo_cli.preference.cache:ReferenceCache._compute", 1, "while the reference was asked"),
    "a step": ("dpo_cli.training.learner:Learner._add_up_gradients", 4, "in step 4"),
    "an update": ("dpo_cli.modeling.policy:Policy.clip", 4, "in step 4"),
    "answers": ("dpo_cli.modeling.generation:greedy_answers", 2, "while prompts of held-out pairs were answered"),
    "an evaluation": ("dpo_cli.pipeline.evaluate:score", 2, "while held-out pairs were scored"),
}


@pytest.fixture
def struck(monkeypatch):
    """Strikes functions, and puts them back afterwards."""
    kept = []

    def arrange(where, how, number):
        module, _, path = where.partition(":")
        owner = __import__(module, fromlist=["_"])
        *above, name = path.split(".")
        for part in above:
            owner = getattr(owner, part)
        kept.append((owner, name, getattr(owner, name)))
        before = {
            (title, there): value
            for title, loaded in sys.modules.items()
            if title.startswith("dpo_cli.")
            for there, value in vars(loaded).items()
            if value is getattr(owner, name)
        }
        strike(where, how, number)
        kept.extend((sys.modules[title], there, value) for (title, there), value in before.items())

    yield arrange
    for owner, name, value in kept:
        setattr(owner, name, value)


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_one_error_that_says_what_was_largest_and_what_to_change(
    write_config, tmp_path, monkeypatch, struck, capfd, stage
):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    where, number, when = STAGES[stage]
    settings = {"training": {"micro_batch_tokens": 400}, "evaluation": {"every_steps": 3}}
    file = write_config(**settings)
    import dpo_cli.pipeline.train  # noqa: F401

    struck(where, "memory", number)
    assert call(f"train {file}") == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: memory ran out {when}: 2.00 GiB more did not fit; the largest parts are ")
    assert re.search(r"largest parts are ([a-z ]+ \([\d.]+ GiB\)(, )?){2,3}$", error)
    advice = "`training.gradient_checkpointing: true`, fewer `training.micro_batch_tokens`, `adapter: lora`"
    assert f"hint: try {'fewer `evaluation.samples`, ' * (stage == 'answers')}{advice}" in said
    for checkpoint in (tmp_path / "runs/run/checkpoints").glob("step-*"):
        verify(checkpoint)
    assert call(f"train {file} --resume") == 0
    assert [row["step"] for row in read_metrics(tmp_path / "runs/run")] == list(range(1, 9))


def test_an_evaluation_after_a_run_says_it_as_well(write_config, struck, capfd):
    file = write_config()
    assert call(f"train {file} training.max_steps=1") == 0
    struck("dpo_cli.pipeline.evaluate:score", "memory", 1)
    assert call(f"eval {file}") == 1
    said = capfd.readouterr().err
    assert "error: memory ran out while held-out pairs were scored: 2.00 GiB more did not fit" in said
    assert "hint: try fewer `training.micro_batch_tokens`" in said
    assert "Traceback" not in said


def passes_fail(patch, number):
    """Let the pass with gradient of a number fail once, for lack of memory."""
    forward, passes = Scorer.forward, 0

    def counted(scorer, batch, **how):
        nonlocal passes
        answer = forward(scorer, batch, **how)
        passes += torch.is_grad_enabled() and answer.requires_grad
        if passes == number:
            passes += 1
            raise OF_A_GPU
        return answer

    patch.setattr(Scorer, "forward", counted)


STEPS = {"training": {"pairs_per_step": 16, "epochs": 3, "max_steps": 5}, "checkpoints": {"every_steps": 2}}


def test_a_step_is_cut_again_and_a_resumed_run_cuts_alike(write_config, tmp_path, monkeypatch, struck, capfd):
    """The one that is resumed takes step 3 again, in which memory ran out before: in the same smaller passes."""
    whole, broken = write_config("whole", **STEPS), write_config("broken", **STEPS)
    # The proof of the layout takes passes with gradient too.
    with monkeypatch.context() as patch:
        counted = []
        forward = Scorer.forward
        patch.setattr(Scorer, "forward", lambda *a, **k: counted.append(torch.is_grad_enabled()) or forward(*a, **k))
        assert call(f"train {write_config('counted', **STEPS)} training.max_steps=2") == 0
        before = sum(counted)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        passes_fail(patch, before + 2)
        assert call(f"train {whole}") == 0
    said = capfd.readouterr().err
    assert said.count("memory ran out in step 3, which is taken again in smaller passes") == 1
    record = tmp_path / "runs/whole/smaller_passes.json"
    assert list(json.loads(record.read_text())) == ["3"]
    with monkeypatch.context() as patch:
        passes_fail(patch, before + 2)
        struck("dpo_cli.training.learner:Learner._finish", "fail", 4)
        assert call(f"train {broken}") == 1
    assert call(f"train {broken} --resume") == 0
    assert "resuming after step 2" in capfd.readouterr().err
    one, other = tmp_path / "runs/whole", tmp_path / "runs/broken"
    assert (one / "final/model.safetensors").read_bytes() == (other / "final/model.safetensors").read_bytes()
    assert without_clock(read_metrics(one)) == without_clock(read_metrics(other))
    assert record.read_bytes() == (other / "smaller_passes.json").read_bytes()
    assert call(f"train {broken} --overwrite training.max_steps=1") == 0
    assert not (other / "smaller_passes.json").exists()


RANKS = {
    "training": {"pairs_per_step": 16, "epochs": 3, "max_steps": 4, "rank_timeout": 60},
    "checkpoints": {"every_steps": 2},
}
SPLIT_8BIT = {"model": {"weights": "split"}, "training": {**RANKS["training"], "optimizer": "adamw_8bit"}}
PLACES = [
    (1, {"passes": 1}, {}),
    (1, {"passes": -1}, {}),
    (0, {"passes": -1, "going_back": True}, {}),
    (1, {"passes": -1, "going_back": True}, {"adapter": {"dropout": 0.5}}),
    (1, {"passes": -1, "going_back": True}, SPLIT_8BIT),
]


@pytest.mark.parametrize(
    ("victim", "place", "settings"),
    slow_unless(lambda case: case is PLACES[1], PLACES),
)
def test_where_memory_runs_out_on_one_rank_all_cut_the_step_again_and_resumed_ones_cut_alike(
    write_config, tmp_path, zygote, victim, place, settings
):
    """In the last pass ranks exchange gradients, which the one that has no memory for its own must not leave."""
    file, run = write_config(**{**RANKS, **settings}), tmp_path / "runs/run"
    command = ["train", "--config", file]
    fault = "tests.faults.strokes:fill_memory", {"step": 3, **place}
    ended = [rank.wait() for rank in start_ranks(zygote, 2, *command, faults={victim: fault})]
    assert [rank.status for rank in ended] == [0, 0], "".join(rank.said for rank in ended)
    assert STRUCK in ended[victim].said
    said = "".join(rank.said for rank in ended)
    assert said.count("memory ran out in step 3, which is taken again in smaller passes") == 1
    record = (run / "smaller_passes.json").read_bytes()
    assert list(json.loads(record)) == ["3"]
    whole, weights = run.rename(tmp_path / "whole"), f"{'adapter_' * ('adapter' in settings)}model.safetensors"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-000004")
    resumed = run_ranks(zygote, 2, *command, "--resume")
    assert resumed.status == 0, resumed.said
    assert "resuming after step 2" in resumed.said
    assert (run / "final" / weights).read_bytes() == (whole / "final" / weights).read_bytes()
    assert without_clock(read_metrics(run)) == without_clock(read_metrics(whole))
    assert (run / "smaller_passes.json").read_bytes() == record


@pytest.mark.slow
def test_where_one_rank_has_one_pair_a_pass_and_no_memory_for_it_both_end_with_one_error(write_config, zygote):
    settings = {"training": {"pairs_per_step": 2, "rank_timeout": 60}}
    command = ["train", "--config", write_config(**settings)]
    fault = "tests.faults.strokes:fill_memory", {"step": 3, "passes": -1, "going_back": True}
    ended = [rank.wait() for rank in start_ranks(zygote, 2, *command, faults={1: fault})]
    assert [rank.status for rank in ended] == [1, 1]
    said = "".join(rank.said for rank in ended)
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "memory ran out in step 3" in error


@pytest.mark.parametrize("text", ["{", '{"3": 0}'])
def test_a_damaged_record_of_smaller_passes_is_an_error(write_config, tmp_path, capfd, text):
    file = write_config()
    assert call(f"train {file} training.max_steps=1") == 0
    (tmp_path / "runs/run/final/manifest.json").unlink()
    (tmp_path / "runs/run/smaller_passes.json").write_text(text)
    assert call(f"train {file} training.max_steps=1 --resume") == 2
    assert "the sizes of forward passes cannot be read" in capfd.readouterr().err


FREE_BYTES = 80 * 10**9
PROGRAM = f"""
import sys
import dpo_cli.modeling.memory as memory
memory.free_bytes = lambda device: {FREE_BYTES}
from dpo_cli.cli import main
main()
"""
IMPORTS = "import dpo_cli.cli, dpo_cli.pipeline.train"


def measured(code, *arguments):
    """Run code in a process of its own; return its status, what it said, seconds of CPU and most bytes resident."""
    report = (
        "import resource, subprocess, sys; done = subprocess.run([sys.executable, '-c', *sys.argv[1:]]); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)"
    )
    command = [sys.executable, "-c", report, code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, seconds, resident = done.stdout.split()[-3:]
    return int(status), done.stderr, float(seconds), float(resident)


def test_a_model_for_which_there_is_no_room_is_refused_in_seconds_and_without_its_weights(
    write_config, tmp_path, tokenizer
):
    """An 8B Llama: 16 bytes a weight are 128 GB. Of its file nothing but the header is there to be read.

    What importing torch and transformers takes is beyond the program; on a busy machine all of it takes longer.
    """
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path / "large"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    header, size = {}, 0
    for name, tensor in weights.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, size + tensor.nbytes]}
        size += tensor.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    _, _, importing, _ = measured(IMPORTS)
    status, said, seconds, resident = measured(PROGRAM, "train", write_config(model=str(folder)))
    assert status == 2
    assert "Traceback" not in said
    assert "training needs at least 119.66 GiB of memory, but 74.51 GiB are free:" in said
    assert re.search(r"^  weights +29\.92 GiB$", said, re.MULTILINE)
    assert "hint: set `training.optimizer: adafactor` (" in said
    assert "`adapter: lora` (" in said
    assert seconds < max(5, 1.5 * importing)
    assert resident < 1.5e9
    assert not (tmp_path / "runs").exists()
