"""What must be quick imports neither torch nor transformers: told by what is imported, not by the clock.

An interrupt is answered in words from the start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib

import pytest

from dpo_cli.system.signals import Interrupted
from tests.builders import save_adapter
from tests.conftest import ROOT, dpo_command, run_dpo
from tests.reporting.runs import healthy, write_run

WATCH = """
import sys
from dpo_cli.cli import app
sys.argv = ["dpo", *{arguments!r}]
status = 0
try:
    app()
except SystemExit as stop:
    status = stop.code or 0
heavy = sorted(name for name in ("torch", "transformers", "accelerate", "datasets", "pyarrow") if name in sys.modules)
sys.stderr.write(f"status {{status}}, heavy {{heavy}}")
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["-h"], 0),
        (["config", "schema"], 0),
        (["config", "example"], 0),
        (["init", "--help"], 0),
        (["init"], 0),
        (["init", "--data", "nowhere.jsonl"], 2),
        (["train", "--config", "wrong.yaml"], 2),
        (["train", "--config", "missing.yaml"], 2),
        (["prepare-data", "--config", "nodata.yaml"], 2),
        (["eval", "--config", "nodata.yaml"], 2),
        (["train", "--config", "nodata.yaml", "adapter.start=adapter"], 2),
        (["sample", "--help"], 0),
        (["sample", "--config", "nodata.yaml", "--count", "0"], 2),
        (["sample", "--config", "nodata.yaml", "--prompts", "nowhere.txt"], 2),
        (["export", "--help"], 0),
        (["export", "nowhere", "--merge", "--to", "out"], 2),
        (["report", "--help"], 0),
        (["report", "nowhere"], 2),
        (["report", "run"], 0),
    ],
)
def test_nothing_heavy_is_imported(tmp_path, arguments, status):
    (tmp_path / "wrong.yaml").write_text("modle: a/b\ntraining: {learning_rat: 1}\n")
    (tmp_path / "nodata.yaml").write_text("model: a/b\ndata: {train: nowhere.jsonl}\n")
    write_run(tmp_path / "run", healthy())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}')
    code = WATCH.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.endswith(f"status {status}, heavy []"), done.stderr


@pytest.mark.parametrize(
    ("package", "setting", "where", "extra"),
    [
        ("peft", "adapter=lora", "`adapter`", "adapters"),
        ("peft", "model.name=adapter", "`model.name`", "adapters"),
        ("bitsandbytes", "model.quantize=nf4", "`model.quantize`", "quantize"),
    ],
)
def test_a_package_that_is_missing_is_reported_with_its_extra_before_anything_is_loaded(
    write_config, tiny_llama, tmp_path, package, setting, where, extra
):
    save_adapter(tiny_llama, tmp_path / "adapter")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    # Python runs this as it starts: the package cannot be found from then on.
    (hidden / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    arguments = ["train", write_config(), setting, *(["adapter=lora"] if "quantize" in setting else [])]
    ended = run_dpo(*arguments, cwd=tmp_path, env={"PYTHONPATH": str(hidden)})

    assert ended.returncode == 2, ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert f"`{package}`" in error
    assert f"in {where}" in ended.stderr
    assert f"pip install 'dpo-cli[{extra}]'" in ended.stderr
    assert "loading" not in ended.stderr


def test_a_run_of_all_weights_needs_no_package_of_an_extra(write_config, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    names = ("peft", "bitsandbytes", "gguf")
    (hidden / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({names}))")
    file = write_config(training={"max_steps": 1})
    for arguments in (["train", file], ["eval", file]):
        ended = run_dpo(*arguments, cwd=tmp_path, env={"PYTHONPATH": str(hidden)})
        assert ended.returncode == 0, ended.stderr


def test_preparing_pairs_imports_nothing_that_models_are_loaded_with():
    loading = (
        "accelerate",
        "transformers.modeling_utils",
        "dpo_cli.modeling.folders.loading",
        "dpo_cli.modeling.folders.saving",
    )
    code = f"import sys, dpo_cli.pipeline.prepare; print([name for name in {loading} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Interrupts

INTERRUPT = """
import os, sys


class Interrupt:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), 2)


sys.modules.pop("signal", None)
sys.meta_path.insert(0, Interrupt)
"""
"""Run by Python as it starts: the process gets a SIGINT when it begins to import a module."""

STOPPED = Interrupted(signal.SIGINT)


@pytest.fixture
def interrupted(tmp_path):
    """Runs a command that is interrupted at the import of a module."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)

    def run(module, *command, **variables):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "INTERRUPTED_AT": module, **variables}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    "module",
    [
        "signal",
        "dpo_cli.cli",
        "typer",
        "dpo_cli.command_line",
        "dpo_cli.config",
        "pydantic",
        "dpo_cli.reporting.console",
    ],
)
def test_an_interrupt_while_python_imports_ends_in_words(interrupted, module):
    """Before the command has read anything: there is no such configuration."""
    assert interrupted(module, *dpo_command("train", "my.yaml")) == (STOPPED.status, "", f"{STOPPED}\n")


def test_an_interrupt_of_the_installed_program_ends_in_words(interrupted):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["dpo"]
    module, _, name = entry.partition(":")
    command = [sys.executable, "-c", f"from {module} import {name}; {name}()", "--help"]
    assert interrupted("dpo_cli.cli", *command) == (STOPPED.status, "", f"{STOPPED}\n")


def test_of_several_processes_the_main_one_answers_an_interrupt(interrupted):
    said = [interrupted("typer", *dpo_command("--help"), RANK=rank, WORLD_SIZE="2") for rank in ("0", "1")]
    assert said == [(STOPPED.status, "", f"{STOPPED}\n"), (STOPPED.status, "", "")]


def test_an_interrupt_that_is_ignored_stays_ignored(interrupted):
    """As a shell's script starts programs in the background."""
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *dpo_command("--version")]
    status, printed, said = interrupted("typer", *command)
    assert (status, printed.split()[0], said) == (0, "dpo", "")


def test_an_interrupt_while_python_ends_changes_neither_what_was_printed_nor_the_status(tmp_path):
    at_exit = "import atexit, signal; atexit.register(signal.raise_signal, signal.SIGINT)"
    (tmp_path / "sitecustomize.py").write_text(at_exit)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = dpo_command("config", "schema")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)
