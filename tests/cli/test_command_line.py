"""The command line as people type it: a file first, `-c`, `-h`, `~` and variables; nothing said twice, or ignored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_cli.command_line import split_arguments
from dpo_cli.config import Config, load_config, resolved_yaml
from dpo_cli.errors import UserError
from dpo_cli.system import plain_yaml
from tests.conftest import run_dpo, write_rows


@pytest.mark.parametrize(
    ("config", "arguments", "overrides"),
    [
        (None, ["my.yaml"], []),
        (None, ["my.yaml", "a.b=1", "c=d.yaml"], ["a.b=1", "c=d.yaml"]),
        (None, ["a.b=1", "my.yaml", "c=2"], ["a.b=1", "c=2"]),
        (Path("my.yaml"), ["a.b=1"], ["a.b=1"]),
        (None, ["my.yaml", "training.epochs"], ["training.epochs"]),
        (Path("my.yaml"), ["training.epochs"], ["training.epochs"]),
    ],
)
def test_the_configuration_is_the_word_without_an_equals_sign(config, arguments, overrides):
    assert split_arguments(config, arguments) == (Path("my.yaml"), overrides)


@pytest.mark.parametrize(
    ("config", "arguments", "what"),
    [
        (None, [], "no configuration is given"),
        (None, ["training.epochs=2"], "no configuration is given"),
        (None, ["a.yaml", "b.yaml"], "several configurations are given: `a.yaml`, `b.yaml`"),
        (Path("a.yaml"), ["b.yaml"], "several configurations are given: `a.yaml`, `b.yaml`"),
    ],
)
def test_a_configuration_is_named_once(config, arguments, what):
    with pytest.raises(UserError, match=what) as caught:
        split_arguments(config, arguments)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        ("train --config a.yaml --config b.yaml", "`--config` is given 2 times", "keep one"),
        ("train -c a.yaml --config b.yaml", "`--config` is given 2 times", "keep one"),
        ("eval a.yaml --json a --json b --json c", "`--json` is given 3 times", "keep one"),
        ("prepare-data a.yaml --show 1 --show 2", "`--show` is given 2 times", "keep one"),
        ("trian a.yaml", "`trian` is not a command of `dpo`", "did you mean `dpo train`?"),
        ("config schemas", "`schemas` is not a command of `dpo config`", "did you mean `dpo config schema`?"),
        ("train a.yaml --resum", "`--resum` is not an option of `dpo train`", "did you mean `--resume`?"),
        ("doctor --json=", "the value of `--json` is empty", "leave the option out"),
        ("eval a.yaml --model= --json -", "the value of `--model` is empty", "leave the option out"),
        ("eval a.yaml --model m --model=", "the value of `--model` is empty", "leave the option out"),
        ("prepare-data a.yaml --show x", "invalid value for `--show`", "dpo prepare-data --help"),
        ("eval a.yaml --data $NOWHERE/x", "the environment variable `NOWHERE` is not defined", "export NOWHERE="),
        ("eval a.yaml --data ${}/x", "`${}` names no environment variable", "`$$` is a dollar sign"),
        ("eval a.yaml --data ${HOME:-x}", "`${HOME:-x}` names no environment variable", "`$$` is a dollar sign"),
        ("eval a.yaml --model ${NOWHERE}/x", "the environment variable `NOWHERE` is not defined", "export NOWHERE="),
        ("prepare-data a.yaml --report ${NOWHERE}", "the environment variable `NOWHERE`", "export NOWHERE="),
        ("train a.yaml training.epochs 2", "`training.epochs 2` is not a setting", "`training.epochs=2`"),
        ("train pairs.jsonl", "the configuration", "dpo init --data pairs.jsonl"),
        ("train pairs.json", "not a mapping of settings, but a list", "dpo init --data pairs.json"),
        ("train $NOWHERE/a.yaml", "the environment variable `NOWHERE` is not defined", "export NOWHERE="),
    ],
)
def test_a_wrong_command_line_is_one_error_with_a_hint(tmp_path, arguments, what, hint):
    (tmp_path / "pairs.jsonl").write_text('"a text"\n')
    (tmp_path / "pairs.json").write_text('[{"prompt": "p", "chosen": "c", "rejected": "r"}]')
    done = run_dpo(*arguments.split(), cwd=tmp_path)
    error, _, advice = done.stderr.partition("\nhint: ")
    assert done.returncode == 2
    assert error.startswith("error: ")
    assert what in error
    assert hint in advice


def test_help_is_short_and_free_of_the_parsers_words():
    for command in ("train", "prepare-data", "eval"):
        short, long = run_dpo(command, "-h").stdout, run_dpo(command, "--help").stdout
        assert short == long
        assert long.startswith(f"Usage: dpo {command} [FILE] [KEY=VALUE ...] [OPTIONS]")
        assert f"dpo {command} my.yaml" in long
        assert "working directory" in long
        assert "list[" not in long
    assert "working directory" in run_dpo("config", "--help").stdout


def test_completion_knows_commands_and_options():
    environment = {"_DPO_COMPLETE": "complete_bash", "COMP_WORDS": "dpo train --over", "COMP_CWORD": "2"}
    program = str(Path(sys.executable).with_name("dpo"))
    done = subprocess.run([program], env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--overwrite"]


def test_the_example_that_is_printed_loads_and_shows_every_group(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(run_dpo("config", "example").stdout, encoding="utf-8")
    config = load_config(file)
    shown = plain_yaml.parse(file.read_text(encoding="utf-8"))[0]
    assert set(shown) == set(Config.model_fields) - {"output_dir"}
    assert config.output_dir == "runs/my"
    lines = file.read_text(encoding="utf-8").splitlines()
    assert sum("#" in line for line in lines) > len(lines) / 3


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home, and a variable that names a folder in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "some data"))
    return tmp_path


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("~/x", "HOME/x"),
        ("$DATA/x", "HOME/some data/x"),
        ("${DATA}x", "HOME/some datax"),
        ("a/~/$$DATA", "a/~/$DATA"),
        ("$$$DATA", "$HOME/some data"),
        ("some/name", "some/name"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("a$1.jsonl", "a$1.jsonl"),
    ],
)
@pytest.mark.parametrize(
    "setting",
    ["model.name", "model.chat_template", "reference.model", "data.train", "data.train.path", "data.eval.0.path",
     "output_dir"],
)  # fmt: skip
def test_paths_are_expanded_wherever_they_are_set(home, setting, written, expected):
    def value(config):
        found = config.model_dump()
        for part in setting.split("."):
            found = found[int(part)] if part.isdigit() else found[part]
        return found

    file = home / "my.yaml"
    file.write_text("model: a/b\ndata: {train: {path: p.jsonl}, eval: [{path: q.jsonl}]}\n")
    config = load_config(file, [f"{setting}={written}"])
    assert value(config) == expected.replace("HOME", str(home))
    again = home / "again.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize("setting", ["model", "data.train", "data.eval", "reference.model", "output_dir"])
def test_a_variable_that_is_not_defined_is_an_error_that_names_it(home, setting):
    file = home / "my.yaml"
    file.write_text("model: a/b\n")
    with pytest.raises(UserError, match="the environment variable `NO_SUCH` is not defined") as caught:
        load_config(file, [f"{setting}=${{NO_SUCH}}/x"])
    assert caught.value.what.startswith(f"`{setting}")
    assert "export NO_SUCH=" in caught.value.hint


def test_a_run_by_home_and_variables_says_where_relative_paths_lead(home, tiny_llama, demo_rows):
    """Nothing but names with `~` and variables: data and model are found, and what is missing is named in full."""
    (home / "some data").mkdir()
    write_rows(home / "some data" / "pairs.jsonl", demo_rows[:8])
    (home / "model").symlink_to(tiny_llama)
    settings = {"model": "~/model", "data": {"train": "$DATA/pairs.jsonl", "eval": None}, "output_dir": "$DATA/run"}
    (home / "my.yaml").write_text(json.dumps(settings))
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    done = run_dpo("prepare-data", "~/my.yaml", "--out", "$DATA/prepared", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert (home / "some data" / "prepared").is_dir()
    lost = {
        "data.train=lost.jsonl": "there is no file or folder `lost.jsonl` ({}/lost.jsonl)",
        "data.train=./*.jsonl": "no data file matches `./*.jsonl` ({}/*.jsonl)",
        "model=lost.gguf": "there is no GGUF file `lost.gguf` ({}/lost.gguf)",
        "model=../a/b/lost": "there is no model folder `../a/b/lost` ({.parent}/a/b/lost)",
        "model.chat_template=lost.jinja": "there is no chat template `lost.jinja` ({}/lost.jinja)",
    }
    for override, message in lost.items():
        done = run_dpo("prepare-data", "-c", "~/my.yaml", override, cwd=elsewhere)
        assert message.format(elsewhere) in done.stderr
    assert f"`lost.yaml` ({elsewhere}/lost.yaml)" in run_dpo("train", "lost.yaml", cwd=elsewhere).stderr
