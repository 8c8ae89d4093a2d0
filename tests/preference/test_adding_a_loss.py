"""CONTRIBUTING.md says how a loss is added; here its example is added to a copy of the package, as it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, dpo_command, read_metrics

pytestmark = pytest.mark.program

FACTS = """
import json
from dpo_cli.config import json_schema
from write_losses_page import page
print(json.dumps([json_schema(), page()]))
"""


@pytest.fixture(scope="module")
def example() -> str:
    """The class that the page shows."""
    (found,) = re.findall(r"^```python\n(class .*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    return found


@pytest.fixture(scope="module")
def package(tmp_path_factory, example):
    """A folder with a copy of the package: one class more in a family's file, and one name more in the union."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "dpo_cli", folder / "dpo_cli", ignore=shutil.ignore_patterns("__pycache__"))
    losses = folder / "dpo_cli" / "preference" / "losses"
    with (losses / "pairwise.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{example}")
    name = re.match(r"class (\w+)", example)[1]
    text = (losses / "__init__.py").read_text(encoding="utf-8")
    text, imports = re.subn(r"(?<=losses\.pairwise import )", f"{name}, ", text)
    text, entries = re.subn(r"^    \| SFT,$", f"    | SFT\n    | {name},", text, flags=re.M)
    assert (imports, entries) == (1, 1)
    (losses / "__init__.py").write_text(text, encoding="utf-8")
    return folder


def run(package, *command: str) -> str:
    """Run a command that imports the copy."""
    path = os.pathsep.join([str(package), str(ROOT / "scripts")])
    # In the copy's folder, since Python looks where it was started before it looks anywhere else.
    done = subprocess.run(
        command, cwd=package, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_schema_and_the_page_of_losses_have_it(package):
    schema, page = json.loads(run(package, sys.executable, "-c", FACTS))
    assert "truncated_quadratic" in schema["$defs"]["TruncatedQuadratic"]["properties"]["type"]["const"]
    assert "\n## truncated_quadratic\n" in page
    assert "    max(0, 1 − βΔ)²\n" in page


def test_a_configuration_trains_with_it(package, write_config, tmp_path):
    """Where the policy equals its reference, (1 − β·0)² = 1."""
    loss = {"type": "truncated_quadratic", "beta": 0.2}
    config = write_config(loss=loss, training={"max_steps": 2}, data={"eval": None})
    run(package, *dpo_command("train", "--config", config))
    rows = read_metrics(tmp_path / "runs" / "run")
    assert len(rows) == 2
    assert rows[0]["loss"] == pytest.approx(1, abs=1e-4)
    assert rows[1]["rewards/margins"] != 0
