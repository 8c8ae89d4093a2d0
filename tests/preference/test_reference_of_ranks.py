"""Ranks compute a reference together, in lockstep, and every disk that any of them has gets all of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from tests.builders import prepare_pairs
from tests.conftest import write_rows
from tests.preference.ranks import DISKS, PAIRS

pytestmark = [pytest.mark.program, pytest.mark.slow]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs") / "prepared"


@pytest.fixture(scope="module")
def pairs(prepared, demo_rows, tokenizer):
    return prepare_pairs(write_rows(prepared.parent / "pairs.jsonl", demo_rows[:PAIRS]), tokenizer, prepared)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("disks")
    (root / "refusing").mkdir()
    (root / "refusing" / "file").write_text("no folder")
    return root


@pytest.fixture(scope="module")
def found(tiny_llama, prepared, pairs, root):
    """What every rank passed and knew, by case."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(DISKS))]
    arguments = ["-m", "tests.preference.ranks", tiny_llama, prepared, root]
    done = subprocess.run([*ranks, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(root / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def expected(tiny_llama, pairs):
    """Each pair alone, by one process."""
    policy = Policy.load(str(tiny_llama))
    policy.read(LAYOUTS["padded"])
    policy.place(Accelerator(cpu=True), trained=False)
    batches = Batches(pairs, LAYOUTS["padded"], 1, torch.device("cpu"))
    with torch.no_grad():
        alone = [batches(MicroBatch((index,))) for index in range(PAIRS)]
        sides = [policy.scorer(batch).split(list(batch.lengths)) for batch in alone]
    return torch.cat([pair[side] for side in range(2) for pair in sides]).numpy()


def keys_on(folder):
    """The keys of the pairs on a disk, each as often as it is there."""
    keys = []
    for path in folder.rglob("*.arrow"):
        with pa.memory_map(str(path)) as source:
            keys += pa.ipc.open_stream(source).read_all().column("key").to_pylist()
    return sorted(keys)


@pytest.mark.parametrize(
    "case", ["shared", "not shared", "halves", "some are known to the last rank", "a disk that takes no file"]
)
def test_every_rank_makes_as_many_passes_and_knows_the_same(found, expected, case):
    assert len({rank["passes"] for rank in found[case]}) == 1
    for rank in found[case]:
        np.testing.assert_array_equal(rank["values"], found[case][0]["values"])
        np.testing.assert_allclose(rank["values"], expected, atol=1e-4)


def test_what_one_rank_knows_is_not_computed_again(found):
    whole = found["shared"][0]["passes"]
    assert whole > 1
    assert all(rank["held"] and not rank["passes"] for rank in found["halves are held"])
    assert not any(rank["held"] for rank in found["some are not held"])
    assert found["halves"][0]["passes"] == 0
    assert 0 < found["some are known to the last rank"][0]["passes"] <= whole


@pytest.mark.parametrize("case", ["not shared", "halves", "some"])
def test_every_disk_has_all_pairs_once(found, pairs, root, case):
    wanted = sorted({pairs.keys()[index] for index in range(PAIRS)})
    for disk in set(DISKS):
        assert keys_on(root / case / disk) == wanted


def test_of_ranks_that_share_a_disk_one_writes(found, pairs, root):
    assert keys_on(root / "shared") == sorted({pairs.keys()[index] for index in range(PAIRS)})
    assert len(list((root / "shared").rglob("*.arrow"))) == 1
    assert not list(root.rglob(".seen*"))
