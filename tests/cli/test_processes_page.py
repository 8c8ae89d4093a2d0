"""What docs/processes.md shows for several machines works as it stands, each machine being a folder here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, dpo_command, read_metrics
from tests.faults.launching import free_port
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
STEPS = {"training": {"max_steps": 2}, "data": {"eval": None}, "evaluation": {}}


def block(start):
    """Return the script on the page that holds some words."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.M)
    (found,) = [text for text in blocks if start in text]
    return re.sub(r"^    ", "", found, flags=re.M)


def started(command, folder, **env):
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def assert_trained(tmp_path):
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "my")] == [1, 2]
    assert (tmp_path / "runs" / "my" / "final" / "model.safetensors").is_file()


def test_torchrun_on_two_machines(write_config, tmp_path):
    write_config("my", **STEPS)
    command = block("--nnodes 2").replace("node1", "127.0.0.1").replace("29500", str(free_port()))
    # Two processes on each of two machines are the least that `hybrid` makes something of.
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 2").replace("\\\n", " ")
    launches = []
    for machine in ("0", "1"):
        program, *words = shlex.split(command.replace("--node-rank 0", f"--node-rank {machine}"))
        assert program == "torchrun"
        launches.append(started([sys.executable, "-m", "torch.distributed.run", *words], tmp_path))
    said = [launch.communicate(timeout=PATIENCE)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], said[0] + said[1]
    assert "4 processes" in said[0]
    assert_trained(tmp_path)


def test_slurm_on_two_machines(write_config, tmp_path):
    """In the place of srun, a script that starts two processes for each of two machines, as Slurm numbers them."""
    write_config("my", **STEPS)
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "dpo": f'exec {" ".join(dpo_command())} "$@"',
        "scontrol": "echo localhost",
        "srun": "shift; export SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2; for rank in 0 1 2 3; do "
        'SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" & jobs="$jobs $!"; done; '
        "status=0; for job in $jobs; do wait $job || status=$?; done; exit $status",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    script = block("#SBATCH --nodes=2").replace("29500", str(free_port()))
    job = started(["bash", "-c", script], tmp_path, PATH=f"{tools}:{os.environ['PATH']}")
    said = job.communicate(timeout=PATIENCE)[0]
    assert job.returncode == 0, said
    assert "4 processes" in said
    assert_trained(tmp_path)
