"""Weights that are sharded over real processes: they give what whole ones give, in a share of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, build_llama
from tests.marks import slow_unless
from tests.waiting import PATIENCE

CASES = [
    (2, "tied", "whole"),
    (2, "untied", "split"),
    (2, "untied", "nf4 in bfloat16"),
    (2, "untied", "lora on bfloat16"),
    (2, "tied", "recomputed"),
    (2, "tied", "lora"),
    (2, "untied", "dora"),
    (2, "tied", "nf4 recomputed"),
    (2, "untied", "dora on nf4"),
    (2, "untied", "int8"),
    (2, "tied", "dora on int8"),
    (3, "tied", "nf4"),
    (3, "tied", "split"),
    (3, "untied", "lora"),
    (4, "tied", "whole"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: build_llama(folder / name, tokenizer, 0, tie_word_embeddings=name == "tied", num_hidden_layers=3)
        for name in ("tied", "untied")
    }


def on_shards(ranks, *arguments):
    """Return what processes found that share a model; `tests/modeling/on_shards.py` says what."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(ROOT / "tests/modeling/on_shards.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.program
@pytest.mark.parametrize(("ranks", "model", "case"), slow_unless(lambda case: case in CASES[:3], CASES))
def test_a_step_on_shards_is_that_on_whole_weights(models, ranks, model, case):
    """Gradients are those of DDP: to the bit between two processes, whose sums have one order.

    Weights in two halves of 16 bits are rounded away from zero where they are halfway, and shards of them to even.
    """
    rounded = case == "split"
    found = on_shards(ranks, models[model], case)
    assert found["same identity"]
    assert found["answers"] <= 5e-3 * rounded
    assert found["same gradients"] or found["gradients"] < (0.02 if rounded else 1e-6 * (ranks > 2))
    assert found["copy"] == 0
    assert found["apart from a copy"] == [True], "a copy has rows of its own that do not train"
    assert found["norm"] < (5e-3 if rounded else 2e-6)
    assert found["moved"] > 0.01
    # In bfloat16 a weight that moved by a little less may be rounded to its neighbour.
    assert found["answers after"] < (0.02 if rounded else 1e-5)
    assert found["beginning"] == 0, "the policy answers as before step 1 no longer"
    assert found["finite"] and not found["finite with a NaN on the last rank"]
    held = found["bytes"]
    # Beside whole weights in two halves of 16 bits, shards of them have both in one number.
    assert held["weights"] == held["share of weights"] * (2 if rounded else 1)
    assert held["gradients"] == held["share of gradients"]
    assert held["moments"] == 2 * held["gradients"]
