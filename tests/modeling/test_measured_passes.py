"""What passes take is a line through two that were really made; measuring changes nothing."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from accelerate import Accelerator

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.measured_passes import PassBytes, measured_passes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.trained import Whole
from tests.builders import prepare_pairs
from tests.conftest import write_rows
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, demo_rows, tokenizer):
    folder = tmp_path_factory.mktemp("pairs")
    return prepare_pairs(write_rows(folder / "pairs.jsonl", demo_rows[:24]), tokenizer, folder / "prepared")


class Kept:
    """Counts what passes keep for their backward pass, as a device counts its memory, and refuses too much of it."""

    def __init__(self, room: float = float("inf")) -> None:
        self.room, self.counted = room, []

    def __call__(self, work):
        kept = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            if sum(one.nbytes() for one in kept.values()) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            work()
        self.counted.append(sum(one.nbytes() for one in kept.values()))
        return self.counted[-1]


def placed(model, trained=None):
    policy = Policy.load(str(model), trained=trained)
    policy.read(LAYOUTS["padded"])
    policy.place(Accelerator(cpu=True), trained=True)
    return policy


def largest(batches):
    cuts = batches.cut(range(len(batches.pairs)))
    return max(cuts, key=lambda cut: batches.layout.tokens(batches.pairs.sizes, cut.pairs))


def of(pairs, num_tokens):
    return Batches(pairs, LAYOUTS["padded"], num_tokens, torch.device("cpu"))


def train(policy, batch):
    with policy.adding_up(last=True):
        policy.scorer(batch).sum().backward()


@pytest.mark.parametrize("trained", [Whole(), Adapted(Lora(dropout=0.5))], ids=["all weights", "adapter"])
def test_the_line_tells_what_passes_of_other_sizes_take(tiny_llama, pairs, trained):
    policy, counter = placed(tiny_llama, trained), Kept()
    before, random = {name: w.clone() for name, w in policy.weights.tensors().items()}, torch.get_rng_state()
    line = measured_passes(policy, of(pairs, 4000), largest, counter)
    assert len(counter.counted) == 3
    assert counter.counted[0] == counter.counted[1] < counter.counted[2]
    for num_tokens in (1000, 2000, 4000):
        batches = of(pairs, num_tokens)
        cut = largest(batches)
        really = Kept()(functools.partial(train, policy, batches(cut)))
        assert line.of(batches.layout.tokens(pairs.sizes, cut.pairs)) == pytest.approx(really, rel=0.1)
        for weights in policy.weights.trained():
            weights.grad = None
    torch.set_rng_state(random)
    measured_passes(policy, of(pairs, 4000), largest, Kept())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weights.grad is None for weights in policy.weights.trained())
    assert all(torch.equal(before[name], weights) for name, weights in policy.weights.tensors().items())


def test_where_the_largest_does_not_fit_a_smaller_one_is_measured(tiny_llama, pairs):
    policy, counter = placed(tiny_llama), Kept()
    measured_passes(policy, of(pairs, 4000), largest, counter)
    full = Kept(room=0.6 * counter.counted[-1])
    line = measured_passes(policy, of(pairs, 4000), largest, full)
    assert max(full.counted) <= full.room
    tokens = of(pairs, 4000).layout.tokens(pairs.sizes, largest(of(pairs, 4000)).pairs)
    assert line.of(tokens) == pytest.approx(counter.counted[-1], rel=0.1)
    assert all(weights.grad is None for weights in policy.weights.trained())


def test_ranks_measure_as_many_passes_and_none_of_them_tries_what_does_not_fit(tiny_llama, pairs):
    """The second rank has the longer pairs and the least room; a pass that fails would leave the first one waiting."""
    longest = pairs.sizes.longest_first(range(len(pairs)))
    counter = Kept()
    measured_passes(placed(tiny_llama), of(pairs, 4000), largest, counter)
    rooms, shares = [float("inf"), 0.6 * counter.counted[-1]], [longest[12:], longest[:12]]
    # transformers changes its own functions while it loads, and two threads would not put them back.
    policies = [placed(tiny_llama) for _ in range(2)]
    both, asked = Barrier(2), [[], []]

    def measure(rank):
        def of_share(batches):
            cuts = batches.cut(shares[rank])
            return max(cuts, key=lambda cut: batches.layout.tokens(batches.pairs.sizes, cut.pairs))

        def have_room(num_bytes):
            both.wait(PATIENCE)
            asked[rank].append(num_bytes <= rooms[rank])
            both.wait(PATIENCE)
            return asked[0][-1] and asked[1][-1]

        counter = Kept(rooms[rank])
        measured_passes(policies[rank], of(pairs, 4000), of_share, counter, have_room)
        return counter.counted

    with ThreadPoolExecutor(2) as ranks:
        counted = list(ranks.map(measure, range(2)))
    assert [len(passes) for passes in counted] == [3, 3]
    assert len(asked[0]) == len(asked[1]) > 1
    assert all(asked[0])
    # The larger pass is larger still, so that there is a line to draw.
    assert counted[0][1] < counted[0][2]


def test_passes_of_one_pair_are_measured_whatever_the_room(tiny_llama, pairs):
    counter = Kept()
    measured_passes(
        placed(tiny_llama), of(pairs, 4000), lambda batches: MicroBatch((0,)), counter, lambda size: not size
    )
    assert len(counter.counted) == 3


def test_one_pair_for_which_there_is_no_room_is_an_error(tiny_llama, pairs):
    with pytest.raises(torch.OutOfMemoryError):
        measured_passes(placed(tiny_llama), of(pairs, 4000), lambda batches: MicroBatch((0,)), Kept(room=1000))


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((100, 1000), (300, 2000), {0: 500, 100: 1000, 300: 2000, 500: 3000}),
        ((300, 2000), (300, 2000), {150: 1000, 300: 2000}),
        ((100, 3000), (300, 2000), {150: 1000, 300: 2000}),
        ((100, 100), (200, 400), {0: 0, 200: 600}),
    ],
    ids=["a line", "one size", "the larger takes less", "nothing is promised below zero"],
)
def test_of_two_sizes_a_line_follows(small, large, expected):
    line = PassBytes.through(small, large)
    assert {tokens: line.of(tokens) for tokens in expected} == expected
