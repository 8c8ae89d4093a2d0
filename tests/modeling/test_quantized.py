"""Layers of few bits a weight: what they hold, what they compute, and what their library must not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRIES_KERNELS = """
import sys
import torch
from dpo_cli.modeling.quantized_layers import import_bitsandbytes
import_bitsandbytes()
import peft.tuners.lora.bnb
assert "bitsandbytes" in sys.modules
import kernels
print(kernels.__name__)
"""


@pytest.mark.program
def test_no_kernel_of_others_is_asked_for_and_nothing_is_printed(tmp_path: Path) -> None:
    # On some CPUs bitsandbytes downloads code as it is imported, if it finds this package.
    asked = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*a, **b):\n    open({str(asked)!r}, 'w').close()\n")
    done = subprocess.run(
        [sys.executable, "-c", TRIES_KERNELS],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("kernels\n", "")
    assert not asked.exists()
