"""`dpo init` writes a configuration that trains as it is, by what the model and the data are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cli.config import load_config
from dpo_cli.errors import UserError
from dpo_cli.jobs import init as write
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.reporting.console import Console
from tests.builders import prepare_pairs, save_adapter
from tests.conftest import CHATML, build_llama, read_metrics, write_rows


def init(out: Path, model: Path | None = None, data: Path | None = None) -> str:
    """Write a configuration in this process and return it."""
    write(Console(quiet=True), model=model and str(model), data=data and str(data), out=out)
    return out.read_text(encoding="utf-8")


def test_without_arguments_it_writes_what_is_to_be_filled_in(tmp_path):
    assert init(tmp_path / "dpo.yaml").count("replace it with yours") == 2
    assert load_config(tmp_path / "dpo.yaml").model.name == "path/to/model"


def test_an_adapter_is_offered_in_a_line_that_works_once_it_is_no_comment(tmp_path, tiny_llama):
    text = init(tmp_path / "my.yaml", tiny_llama)
    assert load_config(tmp_path / "my.yaml").adapter is None
    (tmp_path / "my.yaml").write_text(text.replace("# adapter: lora", "adapter: lora"), encoding="utf-8")
    assert load_config(tmp_path / "my.yaml").adapter == Lora()


@pytest.mark.parametrize("template", [None, CHATML + "{# another #}"])
def test_what_it_writes_of_an_adapter_lets_training_go_on_from_it(tmp_path, tiny_llama, pairs_file, capsys, template):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", rank=3)
    if template:
        (adapter / "chat_template.jinja").write_text(template)
    write(Console(), model=str(adapter), data=str(pairs_file), out=tmp_path / "my.yaml")
    config = load_config(tmp_path / "my.yaml")

    assert config.model.name == str(tiny_llama)
    assert (config.adapter.start, config.adapter.rank) == (str(adapter), 3)
    assert config.model.chat_template == (str(adapter / "chat_template.jinja") if template else None)
    assert 5e-6 <= config.training.learning_rate <= 5e-5
    assert f"{adapter} is an adapter of {tiny_llama}" in capsys.readouterr().err


def test_what_it_writes_of_an_adapter_that_cannot_be_gone_on_from_is_a_configuration_that_is_right(
    tmp_path, tiny_llama, pairs_file, capsys
):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"], rank_pattern={"0.*": 2})
    write(Console(), model=str(adapter), data=str(pairs_file), out=tmp_path / "my.yaml")
    config = load_config(tmp_path / "my.yaml")

    assert (config.model.name, config.adapter) == (str(adapter), None)
    assert config.training.learning_rate < 2e-5
    assert "all of whose weights train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names", [None, {"instruction": "question", "chosen": "Good Answer", "rejected": "Bad Answer"}]
)
def test_what_it_writes_trains_as_it_is(forked_dpo, tmp_path, tiny_llama, demo_rows, names):
    """With columns as they are known and with other names: every pair is read, and two steps are taken."""
    rows = [{(names or {}).get(name, name): row[name] for name in ("instruction", "chosen", "rejected")}
            for row in demo_rows[:40]]  # fmt: skip
    write_rows(tmp_path / "some pairs.jsonl", rows)
    done = forked_dpo("init", "--model", tiny_llama, "--data", "some pairs.jsonl", "--out", "my.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "my.yaml").read_text(encoding="utf-8")
    assert "40 rows looked at" in text
    assert ("guessed" in text) == (names is not None)
    done = forked_dpo("train", "my.yaml", "training.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "runs" / "my")) == 2


def test_the_length_holds_nearly_all_pairs_and_the_share_is_said(tmp_path, tiny_llama):
    """One response in fifty is ten times as long: at 99 % it counts. One in four hundred does not."""
    rows = [{"instruction": "Count.", "chosen": "a " * (20 if n % 50 else 200), "rejected": "b"} for n in range(400)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    assert "fits 100.0% of the pairs" in init(tmp_path / "one.yaml", tiny_llama, data)
    write_rows(data, [rows[1]] * 399 + [rows[0]])
    assert "fits 99.8% of the pairs" in init(tmp_path / "two.yaml", tiny_llama, data)
    one, two = (load_config(tmp_path / name).data.max_length for name in ("one.yaml", "two.yaml"))
    assert two < 200 < one
    assert np.gcd(one, two) % 64 == 0


def test_the_length_is_no_more_than_the_model_reads(tmp_path, tiny_llama, capsys):
    """A response of more tokens than the model reads is dropped; the screen says so before a run does."""
    rows = [{"instruction": f"Go {n}.", "chosen": "a b c " * (400 if n else 1), "rejected": "b"} for n in range(4)]
    data, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "dpo.yaml"
    write(Console(), model=str(tiny_llama), data=str(data), out=out)
    assert load_config(out).data.max_length == 512
    assert "fits 25.0% of the pairs" in out.read_text(encoding="utf-8")
    assert "75.0% of the pairs have more than the 512 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("num_pairs", [1, 5, 6, 1100])
def test_what_it_writes_is_within_the_run_however_few_pairs_there_are(
    forked_dpo, tmp_path, tiny_llama, demo_rows, num_pairs
):
    """Evaluations and checkpoints come before the last step, and where pairs are held out, both sides have some."""
    rows = [{**demo_rows[n % 300], "instruction": f"Task {n}."} for n in range(num_pairs)]
    init(tmp_path / "my.yaml", tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows))
    done = forked_dpo("train", "my.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "never reached" not in done.stderr
    assert (load_config(tmp_path / "my.yaml").data.eval is None) == (num_pairs <= 5)


def test_pairs_of_one_prompt_are_not_held_out(tmp_path, tiny_llama, demo_rows):
    """All pairs of a prompt are on one side, so that the other would be empty."""
    rows = [{**row, "instruction": "Help.", "input": ""} for row in demo_rows[:30]]
    init(tmp_path / "my.yaml", tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows))
    assert load_config(tmp_path / "my.yaml").data.eval is None


@pytest.mark.parametrize(
    ("sizes", "rate", "checkpointing"),
    [
        ({}, 5e-6, False),
        ({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}, 1e-6, True),
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 5e-7, True),
    ],
)
def test_the_learning_rate_follows_the_size_without_the_weights(
    tmp_path, tiny_llama, sizes: dict[str, Any], rate, checkpointing
):
    """The folder has no weights: what they would be is read from `config.json`."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings |= {**sizes, **({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None} if sizes else {})}
    (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    init(tmp_path / "dpo.yaml", model)
    config = load_config(tmp_path / "dpo.yaml")
    assert (config.training.learning_rate, config.training.gradient_checkpointing) == (rate, checkpointing)


def test_a_model_without_a_chat_template_is_given_the_plain_one(tmp_path, tokenizer_folder, pairs_file):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    init(tmp_path / "dpo.yaml", build_llama(tmp_path / "model", tokenizer, seed=0), pairs_file)
    assert load_config(tmp_path / "dpo.yaml").model.chat_template == "plain"


def test_rows_that_cannot_be_read_are_counted_and_dropped_by_what_is_written(tmp_path, tiny_llama, demo_rows):
    rows = [*demo_rows[:30], {"instruction": "What?", "chosen": None, "rejected": "no"}]
    text = init(tmp_path / "dpo.yaml", tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows))
    assert load_config(tmp_path / "dpo.yaml").data.on_bad_row == "drop"
    assert "1 of them does not become a pair" in text


def test_rows_that_teach_nothing_are_counted_and_stop_at_no_setting(tmp_path, tiny_llama, demo_rows):
    """Pairs whose responses are the same are dropped in any case: broken rows that come later still stop a run."""
    rows = [*demo_rows[:30], {"instruction": "What?", "chosen": "no", "rejected": "no"}]
    text = init(tmp_path / "dpo.yaml", tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows))
    assert load_config(tmp_path / "dpo.yaml").data.on_bad_row == "error"
    assert "1 of them does not become a pair" in text


def test_it_shows_what_it_found_and_warns_of_what_it_guessed(tmp_path, tiny_llama, capsys):
    """What the comments of the file say is on the screen as well: the guess, and the rows without a pair."""
    rows = [{"question": f"Go {n}.", "answer_good": "a" if n else "b", "answer_bad": "b"} for n in range(4)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    write(Console(), model=str(tiny_llama), data=str(data), out=tmp_path / "dpo.yaml")
    said = " ".join(capsys.readouterr().err.split())
    assert "4 rows looked at, of the shape text" in said
    assert "{prompt: question, chosen: answer_good, rejected: answer_bad}" in said
    assert "warning: 1 of the rows does not become a pair" in said


def test_nothing_is_warned_of_where_all_is_well(tmp_path, tiny_llama, demo_rows, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", demo_rows[:30])
    write(Console(), model=str(tiny_llama), data=str(data), out=tmp_path / "dpo.yaml")
    said = capsys.readouterr().err
    assert "30 rows looked at, of the shape instruction" in said
    assert "warning" not in said


def test_nothing_is_overwritten_and_all_that_is_wrong_is_said_at_once(tmp_path):
    out = tmp_path / "dpo.yaml"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(ExceptionGroup) as caught:
        init(out, Path("lost/model/x"), Path("lost.jsonl"))
    whats = [error.what for error in caught.value.exceptions]
    assert [what.split(" `")[0] for what in whats[1:]] == ["there is no model folder", "there is no file or folder"]
    assert "exists already" in whats[0]
    assert out.read_text(encoding="utf-8") == "mine"
    with pytest.raises(UserError, match="there is no folder"):
        init(tmp_path / "no" / "dpo.yaml")


def test_data_that_is_prepared_already_is_refused(tmp_path, tokenizer, pairs_file):
    prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    with pytest.raises(UserError, match="is a prepared folder"):
        init(tmp_path / "dpo.yaml", None, tmp_path / "prepared")


def test_it_is_written_to_standard_output_on_demand(forked_dpo, tmp_path, tiny_llama, pairs_file):
    """What is printed is what the file would be: nothing else is on standard output, and no file appears."""
    arguments = ("init", "--model", tiny_llama, "--data", pairs_file, "--out")
    printed, written = (forked_dpo(*arguments, out, cwd=tmp_path) for out in ("-", "my.yaml"))
    assert (printed.returncode, written.returncode) == (0, 0), printed.stderr + written.stderr
    assert printed.stdout == (tmp_path / "my.yaml").read_text(encoding="utf-8")
    assert not (tmp_path / "-").exists()
