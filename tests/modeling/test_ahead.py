"""A thread prepares the next micro-batch, and what is trained, raised and left behind is as if there were none."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling import ahead
from dpo_cli.modeling.ahead import prepared_ahead
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.preference.losses import AOT
from dpo_cli.preference.reference import Cached
from tests.builders import prepare_pairs, train_in_process
from tests.conftest import write_rows

IDS = np.arange(1, 9, dtype=np.int32)


class Pairs(list):
    """Five pairs that remember which thread read them; one of them cannot be read."""

    def __init__(self, broken: int | None = None) -> None:
        super().__init__(TokenizedPair(IDS[: i + 1], IDS[:3], IDS[2 : i + 4], f"f:{i}") for i in range(5))
        self.broken, self.readers = broken, []

    def __getitem__(self, index):
        self.readers.append((index, threading.current_thread() is threading.main_thread()))
        if index == self.broken:
            raise OSError(f"pair {index} cannot be read")
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def _beside_a_cpu(monkeypatch):
    monkeypatch.setattr(ahead, "IN_TURN", set())


def batches_of(pairs):
    return Batches(pairs, LAYOUTS["packed"], 100, torch.device("cpu"))


def ones(*indices):
    return [MicroBatch((index,)) for index in indices]


def left_behind():
    return [thread for thread in threading.enumerate() if thread.name.startswith("next micro-batch")]


def test_all_are_read_by_the_thread_in_turn_one_ahead_of_what_was_asked_for():
    pairs, waiting = Pairs(), threading.Event()

    def upcoming():
        yield from ones(0, 1)
        waiting.set()
        yield from ones(2)

    with prepared_ahead(batches_of(pairs), upcoming()) as batches:
        assert batches(MicroBatch((0,))).pairs == (0,)
        # The second is prepared, and no third one as long as nobody took it.
        assert batches(MicroBatch((1,))).pairs == (1,)
        assert waiting.wait(60)
        assert batches(MicroBatch((2,))).pairs == (2,)
    assert pairs.readers == [(0, False), (1, False), (2, False)]
    assert not left_behind()


def test_what_comes_out_of_turn_or_after_the_last_is_prepared_when_it_is_asked_for():
    pairs = Pairs()
    with prepared_ahead(batches_of(pairs), ones(0, 1)) as batches:
        found = [batches(one).pairs for one in ones(3, 0, 4, 1, 2)]
    assert found == [(3,), (0,), (4,), (1,), (2,)]
    assert sorted(pairs.readers) == [(0, False), (1, False), (2, True), (3, True), (4, True)]


def test_what_goes_wrong_is_raised_where_that_micro_batch_is_asked_for_and_the_thread_ends():
    with (
        pytest.raises(OSError, match="pair 1 cannot be read"),
        prepared_ahead(batches_of(Pairs(1)), ones(0, 1)) as ready,
    ):
        assert ready(MicroBatch((0,))).pairs == (0,)
        ready(MicroBatch((1,)))
    assert not left_behind()


def test_a_micro_batch_that_cannot_be_read_and_is_never_asked_for_does_not_matter():
    with prepared_ahead(batches_of(Pairs(1)), ones(0, 1, 2)) as batches:
        assert batches(MicroBatch((0,))).pairs == (0,)
    assert not left_behind()


@pytest.mark.parametrize("end", [KeyboardInterrupt, GeneratorExit])
def test_the_thread_ends_however_the_run_does(end):
    with pytest.raises(end), prepared_ahead(batches_of(Pairs()), ones(0, 1, 2)) as batches:
        batches(MicroBatch((0,)))
        raise end
    assert not left_behind()


def test_no_thread_is_started_beside_a_cpu(monkeypatch):
    monkeypatch.setattr(ahead, "IN_TURN", {"cpu"})
    pairs = Pairs()
    with prepared_ahead(batches_of(pairs), ones(0)) as batches:
        assert not left_behind()
        batches(MicroBatch((0,)))
    assert pairs.readers == [(0, True)]


@pytest.mark.parametrize("settings", [{}, {"loss": AOT(), "reference": Cached()}], ids=["one pass", "two passes"])
def test_a_run_with_a_thread_is_the_run_without_one(tiny_llama, tmp_path, demo_rows, tokenizer, monkeypatch, settings):
    pairs = prepare_pairs(write_rows(tmp_path / "pairs.jsonl", demo_rows[:24]), tokenizer, tmp_path / "prepared")
    how = {"micro_batch_tokens": 700, "max_steps": 3, "layout": "packed", **settings}
    prepare, by_thread = Batches.prepare, []

    def noted(batches, micro_batch):
        by_thread.append(threading.current_thread() is not threading.main_thread())
        return prepare(batches, micro_batch)

    monkeypatch.setattr(Batches, "prepare", noted)
    metrics, weights = train_in_process(tiny_llama, pairs, **how)
    # All but the reference's own pass, and none for which the main thread had to wait in vain.
    assert by_thread.count(True) > 3
    assert not left_behind()
    monkeypatch.setattr(ahead, "IN_TURN", {"cpu"})
    expected, same = train_in_process(tiny_llama, pairs, **how)
    assert metrics == expected
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())
