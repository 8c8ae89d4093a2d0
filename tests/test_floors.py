"""The floors hold, and the script that says so can say otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.program


def test_no_room_imports_from_a_floor_above():
    done = subprocess.run(
        [sys.executable, "scripts/check_floors.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_an_import_that_goes_up_is_found(tmp_path):
    script = (ROOT / "scripts" / "check_floors.py").read_text(encoding="utf-8")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "check_floors.py").write_text(script, encoding="utf-8")
    room = tmp_path / "dpo_cli" / "modeling"
    room.mkdir(parents=True)
    (room / "logps.py").write_text("import os\nfrom dpo_cli.training import loop\nfrom dpo_cli.data import records\n")
    (tmp_path / "dpo_cli" / "attic.py").write_text("")
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "check_floors.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "dpo_cli/modeling/logps.py:2: `modeling` imports `training`" in done.stdout
    assert "`attic` is on no floor" in done.stdout
    assert "logps.py:3" not in done.stdout
