"""A step in which memory runs out is cut again and taken as if it had never been begun."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dpo_cli.data.prepared.step_plan import MicroBatch, Plan, Step
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.out_of_memory import asked_for, is_out_of_memory
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.preference.losses import BCO
from dpo_cli.preference.reference import Synced
from dpo_cli.training.recuts import Recuts
from tests.builders import prepare_pairs, train_in_process
from tests.conftest import write_rows

OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
OF_A_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, demo_rows, tokenizer):
    folder = tmp_path_factory.mktemp("pairs")
    return prepare_pairs(write_rows(folder / "pairs.jsonl", demo_rows[:40]), tokenizer, folder / "prepared")


class FullMemory:
    """Lets passes with gradient fail: one of them, or all from the first on."""

    def __init__(self, monkeypatch, error, *, at: int | None = None) -> None:
        self.passes = 0
        forward = Scorer.forward

        def counted(scorer, batch, **how):
            answer = forward(scorer, batch, **how)
            if torch.is_grad_enabled():
                self.passes += 1
                if at in (None, self.passes):
                    raise error
            return answer

        monkeypatch.setattr(Scorer, "forward", counted)


def passes(pairs, num_tokens, step):
    """Return how many passes with gradient the steps before one have together, and how many it has itself."""
    cut = Batches(pairs, LAYOUTS["padded"], num_tokens, torch.device("cpu")).cut
    counts = [len(one.micro_batches) for one in Plan(np.arange(40), pairs.sizes.longest, 8, 1, 4, True, 0).steps(cut)]
    return sum(counts[: step - 1]), counts[step - 1]


WAYS = {
    "all weights": {},
    "dropout": {"ways": {"trained": Adapted(Lora(rank=4, dropout=0.3))}},
    "statistics": {"loss": BCO()},
    "a reference that moves": {"reference": Synced(every_steps=1, alpha=0.5)},
}


@pytest.mark.parametrize(
    ("way", "error"), [("all weights", OF_A_CPU), *((way, OF_A_GPU) for way in WAYS if way != "all weights")]
)
def test_the_run_is_that_of_one_that_was_told_from_which_step_on_passes_are_smaller(
    tiny_llama, pairs, monkeypatch, way, error
):
    """Memory runs out in the second pass of step 3, when the gradients of the first were added up already."""
    settings = {"max_steps": 4, "micro_batch_tokens": 1200, "learning_rate": 1e-3, **WAYS[way]}
    before, own = passes(pairs, 1200, 3)
    assert own > 1

    def train(recuts):
        torch.manual_seed(0)
        return train_in_process(tiny_llama, pairs, recuts=recuts, **settings)

    told = []
    with monkeypatch.context() as patch:
        full = FullMemory(patch, error, at=before + 2)
        recuts = Recuts(allowed=True, changed=lambda step, tokens: told.append((step, tokens)))
        cut_again, weights = train(recuts)
    assert told == [(3, 600)]
    assert full.passes == before + 2 + sum(passes(pairs, 600, step)[1] for step in (3, 4))
    expected, same = train(Recuts(tokens=dict(told)))
    assert cut_again == expected
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())
    whole, other = train(Recuts())
    assert whole[:2] == expected[:2]
    assert not all(torch.equal(weights[name], tensor) for name, tensor in other.items())


def test_a_step_is_not_cut_again_where_nobody_allowed_it(tiny_llama, pairs, monkeypatch):
    FullMemory(monkeypatch, OF_A_GPU)
    with pytest.raises(torch.OutOfMemoryError):
        train_in_process(tiny_llama, pairs, max_steps=1)


def test_one_pair_for_which_there_is_no_room_is_an_error(tiny_llama, pairs, monkeypatch):
    FullMemory(monkeypatch, OF_A_GPU)
    recuts = Recuts(allowed=True)
    with pytest.raises(torch.OutOfMemoryError):
        train_in_process(tiny_llama, pairs, max_steps=1, recuts=recuts)
    assert list(recuts.tokens) == [1]


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_llama, pairs, monkeypatch):
    FullMemory(monkeypatch, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_in_process(tiny_llama, pairs, max_steps=1, recuts=Recuts(allowed=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_halved_until_its_cut_is_another(pairs, layout):
    batches = Batches(pairs, LAYOUTS[layout], 100_000, torch.device("cpu"))
    numbers = tuple(range(8))
    step, recuts = Step(5, 0.1, 8, numbers, tuple(batches.cut(numbers))), Recuts(allowed=True)
    recuts.halve(step, batches, Accelerator(cpu=True), OF_A_GPU)
    (num_tokens,) = recuts.tokens.values()
    assert len(recuts.batches(batches, 5).cut(numbers)) > 1
    assert recuts.batches(batches, 4) == batches
    assert recuts.batches(batches, 9).micro_batch_tokens == num_tokens
    single = Step(5, 0.1, 8, numbers, tuple(MicroBatch((n,)) for n in numbers))
    with pytest.raises(torch.OutOfMemoryError):
        recuts.halve(single, batches, Accelerator(cpu=True), OF_A_GPU)
    assert list(recuts.tokens) == [5]


@pytest.mark.parametrize(
    ("error", "found", "asked"),
    [
        (OF_A_GPU, True, "2.00 GiB"),
        (OF_A_CPU, True, "4398046511104 bytes"),
        (RuntimeError("CUDA error: out of memory"), True, ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, ""),
        (MemoryError("Unable to allocate 4.00 TiB for an array"), True, ""),
        (RuntimeError("The size of tensor a (3) must match"), False, ""),
        (ValueError("out of memory"), False, ""),
    ],
    ids=str,
)
def test_every_way_to_say_it_is_known(error, found, asked):
    assert is_out_of_memory(error) == found
    assert asked_for(error) == asked


def test_what_a_cpu_really_says_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50, dtype=torch.float32)
    assert is_out_of_memory(refused.value)
    with pytest.raises(MemoryError) as refused_array:
        np.zeros(1 << 55)
    assert is_out_of_memory(refused_array.value)
