"""All ranks of a run make the same forward passes, in the same order: where weights are split, each needs all ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.marks import slow_unless

pytestmark = pytest.mark.program

UNEVEN = {"pairs_per_step": 13, "micro_batch_tokens": 300}
"""Of 40 pairs 32 are trained on, 13 in two steps and 6 in the last; 8 are held out. No rank has as many micro-batches
as another, nor as many pairs."""

SHORT_SECONDS = 180
"""Ranks that wait for each other are ended: the test fails, and does not hang."""

CASES = {
    "dpo, cached": (2, {}),
    "aot, frozen": (3, {"loss": "aot", "reference": "frozen"}),
    "simpo, without a reference": (3, {"loss": "simpo", "reference": "none", "training": {"layout": "padded"}}),
    "an adapter, synced": (2, {"adapter": "lora", "reference": {"type": "synced", "every_steps": 2}}),
}


def passes_of(num_ranks, folder, *arguments):
    """Run the program on ranks; return the passes of each."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    ended = subprocess.run(
        [*command, "-m", "tests.cli.counted", *map(str, (folder, *arguments))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SHORT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)], ended.stderr


@pytest.mark.parametrize("case", slow_unless(lambda name: name == "dpo, cached", CASES))
def test_ranks_make_the_same_passes(write_config, tmp_path, monkeypatch, case):
    num_ranks, settings = CASES[case]
    settings = {**settings, "training": {**UNEVEN, **settings.get("training", {})}, "evaluation": {"every_steps": 2}}
    settings["training"]["rank_timeout"] = 60
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    file = write_config("several", **settings)
    passes, said = passes_of(num_ranks, tmp_path / "passes", "train", "--config", file)
    assert passes == passes[:1] * num_ranks
    assert {True, False} == set(passes[0])
    assert re.search(r"^evaluating: 8/8", said, re.M)


@pytest.mark.slow
def test_ranks_that_evaluate_make_the_same_passes(write_config, tiny_llama, tmp_path):
    """Eight held-out pairs, one in a micro-batch, do not divide among three ranks."""
    file = write_config(training={"micro_batch_tokens": 1, "layout": "padded"})
    passes, said = passes_of(3, tmp_path / "passes", "eval", "--config", file, "--model", tiny_llama, "--json", "-")
    assert passes == passes[:1] * 3
    assert "8/8" in said
