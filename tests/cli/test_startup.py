"""What must be quick imports neither torch nor transformers: told by what is imported, not by the clock."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    ],
)
def test_nothing_heavy_is_imported(tmp_path, arguments, status):
    (tmp_path / "wrong.yaml").write_text("modle: a/b\ntraining: {learning_rat: 1}\n")
    (tmp_path / "nodata.yaml").write_text("model: a/b\ndata: {train: nowhere.jsonl}\n")
    code = WATCH.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.endswith(f"status {status}, heavy []"), done.stderr
