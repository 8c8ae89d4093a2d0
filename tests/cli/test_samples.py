"""The held-out prompts that a run answers: in samples.jsonl, in the closing summary, and the same after a resume."""

from __future__ import annotations

import re
import shutil
import warnings

import pytest
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.in_process import call
from tests.conftest import make_config, read_metrics, read_rows, read_samples, write_rows

EVALUATION = {"every_steps": 3, "samples": 3, "max_new_tokens": 6}
STEPS = [0, 3, 6, 8]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forked_dpo, tiny_llama, demo_rows):
    """Trains eight steps in a folder of its own; returns the configuration, the run and what was said."""

    def train(rows=demo_rows[:40], **settings):
        folder = tmp_path_factory.mktemp("run")
        pairs = write_rows(folder / "pairs.jsonl", rows)
        file = make_config(folder, tiny_llama, pairs, **{"evaluation": EVALUATION, **settings})
        result = forked_dpo("train", "--config", file)
        assert result.returncode == 0, result.stderr
        return file, folder / "runs" / "run", result

    return train


@pytest.fixture(scope="module")
def finished(trained):
    """A run that the tests leave as it is."""
    return trained()


def assert_answers_of(model, tokenizer, rows, max_new_tokens=6):
    """Compare answers with those of transformers' own `generate` to the same text."""
    end = tokenizer.eos_token_id
    for row in rows:
        tokens = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        found = model.generate(**tokens, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
        answer = found[0, tokens["input_ids"].shape[1] :].tolist()
        text = answer[: answer.index(end)] if end in answer else answer
        expected = tokenizer.decode(text), len(text) + (end in answer), end in answer
        assert (row["answer"], row["tokens"], row["ended"]) == expected


def at(rows, step):
    return [row for row in rows if row["step"] == step]


def test_held_out_prompts_are_answered_before_step_1_at_evaluations_and_at_the_end(finished, demo_rows):
    _, run, _ = finished
    rows = read_samples(run)
    assert [row["step"] for row in rows] == [step for step in STEPS for _ in range(3)]
    assert list(rows[0]) == ["step", "where", "prompt", "answer", "tokens", "ended", "chosen", "chosen_tokens"]
    asked = {row["where"]: row for row in rows}
    assert len(asked) == 3
    for where, row in asked.items():
        pair = demo_rows[int(where.rpartition(":")[2]) - 1]
        assert pair["instruction"] in row["prompt"]
        assert row["chosen"] == pair["chosen"]
    assert at(rows, 0) != at(rows, 8)
    # A random model does not end: it says the same on and on.
    assert not any(row["ended"] for row in rows)


def test_answers_are_those_of_the_model_that_was_there(finished, tiny_llama):
    _, run, _ = finished
    tokenizer, rows = AutoTokenizer.from_pretrained(run / "final"), read_samples(run)
    for folder, step in ((tiny_llama, 0), (run / "checkpoints" / "step-000006", 6), (run / "final", 8)):
        assert_answers_of(AutoModelForCausalLM.from_pretrained(folder), tokenizer, at(rows, step))


def test_the_summary_shows_answers_before_and_after(finished):
    _, run, result = finished
    before, after = (at(read_samples(run), step) for step in (0, 8))
    lines = result.stdout.splitlines()
    assert [line[:6].rstrip() for line in lines if line.startswith(("prompt", "before", "after "))] == [
        "prompt", "before", "after", "prompt", "before", "after",
    ]  # fmt: skip
    shown = [line for line in lines if line.startswith(("before", "after "))]
    assert all(line.endswith(" (not ended after 6 tokens)") for line in shown)
    assert "<|im_start|>" not in next(line for line in lines if line.startswith("prompt"))
    assert before[0]["prompt"] == after[0]["prompt"]
    assert f"samples  {run / 'samples.jsonl'}" in lines


def test_a_resumed_run_has_the_same_answers_also_where_the_file_was_torn(finished, forked_dpo, tmp_path):
    file, run, _ = finished
    whole = read_samples(run)
    kept = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(kept / "final")
    shutil.rmtree(kept / "checkpoints" / "step-000008")
    with (kept / "samples.jsonl").open("a") as samples:
        samples.write('{"step": 9, "where": "x"}\n{"step": 8, "whe')
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={kept}")
    assert result.returncode == 0, result.stderr
    assert "warning: rows" not in result.stderr
    assert read_samples(kept) == whole


def test_rows_that_are_gone_are_missed_and_those_of_the_last_step_written_again(finished, forked_dpo, tmp_path):
    file, run, _ = finished
    kept = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(kept / "final")
    lines = (kept / "samples.jsonl").read_text().splitlines(keepends=True)
    (kept / "samples.jsonl").write_text("".join(lines[:-2]))
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={kept}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^warning: rows of .*samples.jsonl are missing or changed", result.stderr, re.M)
    assert read_samples(kept) == read_samples(run)
    assert [row["step"] for row in read_metrics(kept, "eval")] == STEPS


@pytest.mark.parametrize(
    ("name", "split", "damage"),
    [
        ("samples", None, {"tokens": None}),
        ("samples", None, {"prompt": 3}),
        ("metrics", "eval", {"accuracy_interval": [0.5]}),
    ],
    ids=["an answer without length", "a number as a prompt", "an interval without end"],
)
def test_rows_that_somebody_changed_are_missed_and_end_no_run(finished, forked_dpo, tmp_path, name, split, damage):
    """What a run is diagnosed by may be anything, once somebody has written into its files."""
    file, run, _ = finished
    kept = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(kept / "final")
    shutil.rmtree(kept / "checkpoints" / "step-000008")
    rows = [row | damage if row.get("split") == split else row for row in read_rows(kept / f"{name}.jsonl")]
    write_rows(kept / f"{name}.jsonl", rows)
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={kept}")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^warning: rows of .*{name}.jsonl are missing or changed", result.stderr, re.M)
    assert (kept / "final" / "model.safetensors").read_bytes() == (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_batch_of_answers_has_twice_the_tokens_of_a_micro_batch_at_most(write_config, monkeypatch, recomputed):
    """And as many where a step keeps so little that the cache of as many tokens would be larger."""
    from dpo_cli.evaluation import samples

    sizes, answer = [], samples.greedy_answers

    def noted(policy, prompts, stops, max_new_tokens):
        sizes.append(len(prompts) * (max(map(len, prompts)) + max_new_tokens))
        return answer(policy, prompts, stops, max_new_tokens)

    monkeypatch.setattr(samples, "greedy_answers", noted)
    training = {"micro_batch_tokens": 150, "gradient_checkpointing": recomputed, "max_steps": 1}
    assert call(f"train {write_config(training=training, evaluation={'samples': 8, 'max_new_tokens': 4})}") == 0
    assert 75 * (2 - recomputed) < max(sizes) <= 150 * (2 - recomputed)


def test_how_many_are_answered_and_how_long_may_change_on_resume(finished, forked_dpo, tmp_path):
    """A larger number has the prompts of the smaller one among them."""
    file, run, _ = finished
    kept = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(kept / "final")
    shutil.rmtree(kept / "checkpoints" / "step-000008")
    others = f"output_dir={kept}", "evaluation.samples=5", "evaluation.max_new_tokens=2"
    result = forked_dpo("train", "--config", file, "--resume", *others)
    assert result.returncode == 0, result.stderr
    rows = read_samples(kept)
    assert [row["step"] for row in rows] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 8, 8, 8, 8, 8]
    assert {row["where"] for row in at(rows, 0)} < {row["where"] for row in at(rows, 8)}
    assert {row["tokens"] for row in at(rows, 8)} == {2}


@pytest.mark.parametrize(
    "settings",
    [{"evaluation": {"samples": 0}}, {"data": {"eval": None}, "evaluation": {}}],
    ids=["none are asked for", "nothing is held out"],
)
def test_without_samples_there_is_no_file_and_nothing_is_said(trained, settings):
    _, run, result = trained(training={"max_steps": 2}, **settings)
    assert not (run / "samples.jsonl").exists()
    assert "samples" not in result.stdout + result.stderr


def test_of_fewer_held_out_prompts_each_is_answered_once(trained, demo_rows):
    rows = [row for row in demo_rows[:4] for _ in range(3)]
    # Three pairs of each prompt.
    rows = [{**row, "chosen": row["chosen"] + "!" * number} for number, row in enumerate(rows)]
    _, run, _ = trained(rows, data={"eval": 0.5}, training={"max_steps": 2}, evaluation={"samples": 9})
    answered = [row["prompt"] for row in at(read_samples(run), 0)]
    assert len(answered) == len(set(answered)) == 2


def test_with_an_adapter_the_base_answers_first_and_peft_answers_the_same_at_the_end(trained, tiny_llama):
    training = {"learning_rate": 1e-1, "max_steps": 4, "gradient_checkpointing": True}
    _, run, _ = trained(adapter={"rank": 4, "dropout": 0.3}, training=training)
    tokenizer, rows = AutoTokenizer.from_pretrained(tiny_llama), read_samples(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert_answers_of(base, tokenizer, at(rows, 0))
    assert at(rows, 4) != [{**row, "step": 4} for row in at(rows, 0)]
    with warnings.catch_warnings():
        # PEFT asks transformers in a way that is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        trained_model = PeftModelForCausalLM.from_pretrained(base, run / "final").eval()
        assert_answers_of(trained_model, tokenizer, at(rows, 4))
