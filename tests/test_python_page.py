"""The page about Python: its blocks run in order, and what the functions in them return is as it says."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_cli
from dpo_cli.config import load_config
from tests.conftest import ROOT, make_config, read_metrics, write_rows

PAGE = ROOT / "docs" / "python.md"


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama, demo_rows) -> Path:
    """A folder with what the page names."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_llama, folder / "models" / "my-model")
    write_rows(folder / "pairs.jsonl", demo_rows[:24])
    return folder


@pytest.fixture(scope="module")
def names(project) -> dict[str, object]:
    """What is defined after the blocks of the page were run in order."""
    found: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S):
            exec(compile(block, str(PAGE), "exec"), found)
    return found


def test_steps_are_those_of_the_run(names, project):
    """There is a result for each step, and its metrics are those that the run wrote down."""
    rows = read_metrics(project / "runs/from-python")
    assert names["losses"] == [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (project / "runs/from-python/final/model.safetensors").is_file()


def test_a_run_in_two_parts_is_the_run_in_one(names, project):
    """It goes on after the checkpoint of step 2, and ends with the same weights."""
    assert names["rest"] == [3, 4]
    one, two = (project / "runs" / name / "final/model.safetensors" for name in ("from-python", "in-two-parts"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.program
def test_figures_are_those_of_the_command(names, project, forked_dpo):
    """The reference is the model before step 1: against itself it prefers nothing."""
    assert names["before"]["rewards/accuracies"] == 0.5
    assert names["trained"] == names["figures"]
    file = project / "my.yaml"
    file.write_text(json.dumps({**names["config"], "output_dir": str(project / "runs/from-python")}), encoding="utf-8")
    settings = [f"model={project / 'models/my-model'}", f"data.train={project / 'pairs.jsonl'}"]
    done = forked_dpo("eval", file, *settings, "--json", "-")
    assert done.returncode == 0, done.stderr
    of_the_command = json.loads(done.stdout)
    for name in ("pairs", "loss", "rewards/margins", "rewards/accuracies"):
        assert names["trained"][name] == of_the_command[name]


def test_a_merged_model_is_a_plain_folder(names, project):
    """The base and what the adapter has learned, to the rounding of sums in float32."""
    assert names["merged"]["difference"]["largest"] < 1e-4
    assert (project / "models/merged/model.safetensors").is_file()
    assert not (project / "models/merged/adapter_config.json").exists()


def test_the_report_counts_what_was_read(names):
    assert sum(part["pairs_kept"] for part in names["report"].read.values()) == 24


@pytest.mark.parametrize("kind", ["a file", "a path of a file", "a mapping with paths", "a configuration"])
def test_a_configuration_is_a_file_a_mapping_or_what_was_read(tmp_path, tiny_llama, pairs_file, kind):
    file = make_config(tmp_path, tiny_llama, pairs_file, training={"max_steps": 1})
    run = {"model": tiny_llama, "data": {"train": pairs_file}, "training": {"max_steps": 1}}
    given = {
        "a file": str(file),
        "a path of a file": file,
        "a mapping with paths": {**run, "output_dir": tmp_path / "runs" / "run"},
        "a configuration": load_config(file),
    }
    steps = list(dpo_cli.train(given[kind]))
    assert [(step.number, step.broken) for step in steps] == [(1, None)]
    assert (tmp_path / "runs/run/final").is_dir()


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_one_process_computes_in_one_precision_after_the_other(tmp_path, tiny_llama, pairs_file, dtypes):
    settings = {"model": {"name": tiny_llama}, "data": {"train": pairs_file}, "training": {"max_steps": 1}}
    for dtype in dtypes:
        config = {**settings, "model": {**settings["model"], "dtype": dtype}, "output_dir": tmp_path / dtype}
        assert len(list(dpo_cli.train(config))) == 1


def test_errors_are_raised_at_the_call_and_name_the_setting(tmp_path, tiny_llama, pairs_file):
    good = {"model": tiny_llama, "data": {"train": pairs_file}}
    with pytest.raises(dpo_cli.UserError, match="`output_dir` is missing"):
        dpo_cli.train(good)
    with pytest.raises(ExceptionGroup) as raised:
        dpo_cli.train({"modle": "m", "data": {"train": pairs_file}, "output_dir": tmp_path / "run"})
    assert {error.what for error in raised.value.exceptions} == {"`model` is missing", "`modle` is not a setting"}
    with pytest.raises(dpo_cli.UserError, match="needs a reference"):
        dpo_cli.prepare({**good, "reference": "none"})
    with pytest.raises(dpo_cli.UserError, match="exclude each other"):
        dpo_cli.train({**good, "output_dir": tmp_path / "run"}, resume=True, overwrite=True)


def test_nothing_is_printed_and_warnings_are_logged(tmp_path, tiny_llama, pairs_file, capfd, caplog):
    config = {
        "model": tiny_llama,
        "data": {"train": pairs_file},
        "training": {"max_steps": 1},
        "checkpoints": {"every_steps": 50},
        "output_dir": tmp_path / "run",
    }
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        list(dpo_cli.train(config))
    assert capfd.readouterr() == ("", "")
    assert "`checkpoints.every_steps` 50 is never reached" in caplog.text


@pytest.mark.program
def test_importing_the_package_and_a_wrong_call_import_nothing_slow():
    code = """
import sys, dpo_cli
try:
    dpo_cli.train({"modle": "a/b"})
except ExceptionGroup:
    pass
print(sorted(name for name in ("torch", "transformers", "accelerate", "pyarrow", "pydantic") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pydantic']"
