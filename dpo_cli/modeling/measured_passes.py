"""What forward and backward passes take in memory, measured where the device counts it: a line through two sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.out_of_memory import is_out_of_memory
from dpo_cli.modeling.policy import Policy

PeakCounter = Callable[[Callable[[], None]], int]
"""Does some work, and returns the most bytes that were held at once during it beyond those that were held before."""

HaveRoom = Callable[[int], bool]
"""Tells whether all processes have room for as many bytes as each of them asks for."""

_SMALLER = 4
"""How many times more tokens the larger of the two passes is allowed."""


@dataclass(frozen=True)
class PassBytes:
    """What one pass with gradient takes, by its tokens.

    Attributes:
        fixed: What it takes however few tokens it has, in bytes.
        per_token: What each token adds, in bytes.
    """

    fixed: float
    per_token: float

    def of(self, num_tokens: int) -> int:
        """Return what a pass of so many tokens takes, in bytes."""
        return int(self.fixed + self.per_token * num_tokens)

    @classmethod
    def through(cls, small: tuple[int, int], large: tuple[int, int]) -> PassBytes:
        """Return the line through two passes, each given by its tokens and its bytes.

        Of two that are not apart, or of which the larger took less, the larger one decides, in proportion.
        """
        tokens, size = large[0] - small[0], large[1] - small[1]
        if tokens <= 0 or size <= 0:
            return cls(0.0, large[1] / large[0])
        slope = size / tokens
        # Below 0 it would promise too much to small passes.
        return cls(max(0.0, large[1] - slope * large[0]), slope)


def cuda_peak(work: Callable[[], None]) -> int:
    """Do some work on the current CUDA device; return the most bytes that it held beyond those held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured_passes(
    policy: Policy,
    batches: Batches,
    largest: Callable[[Batches], MicroBatch],
    counter: PeakCounter,
    have_room: HaveRoom | None = None,
) -> PassBytes:
    """Measure one forward and backward pass of the largest micro-batch, and one of a smaller one; change nothing.

    Where there is no room for the largest, one of half the tokens is measured in its place.

    Args:
        policy: The policy, placed.
        batches: Cuts pairs under the most tokens that are wanted.
        largest: Returns the largest micro-batch of a run under a number of tokens.
        counter: Counts the device's memory.
        have_room: Asked by all processes where a pass needs all of them; None: no other process waits for this one.

    Raises:
        torch.OutOfMemoryError: There is no room for a pass of one pair.
    """

    def measured(cut: MicroBatch) -> tuple[int, int]:
        batch = batches(cut)

        def work() -> None:
            with policy.adding_up(last=False):
                policy.scorer(batch).sum().backward()

        return batches.layout.tokens(batches.pairs.sizes, cut.pairs), counter(work)

    with torch.random.fork_rng(devices=[batches.device] if batches.device.type == "cuda" else []):
        try:
            small = largest(_under(batches, batches.micro_batch_tokens // _SMALLER))
            # The first pass makes the gradients, and what libraries set up once.
            measured(small)
            before = measured(small)
            if have_room is None:
                return PassBytes.through(before, _largest_that_fits(batches, largest, measured))
            return PassBytes.through(before, measured(_largest_for_all(batches, largest, before, have_room)))
        finally:
            for weights in policy.weights.trained():
                weights.grad = None
            if batches.device.type == "cuda":
                torch.cuda.empty_cache()


def _largest_that_fits(
    batches: Batches,
    largest: Callable[[Batches], MicroBatch],
    measured: Callable[[MicroBatch], tuple[int, int]],
) -> tuple[int, int]:
    """Measure the largest micro-batch, or that under half the tokens for which there is room."""
    while True:
        cut = largest(batches)
        try:
            return measured(cut)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(cut.pairs) == 1:
                raise
        # Only now is the error gone, whose traceback held what was computed.
        if batches.device.type == "cuda":
            torch.cuda.empty_cache()
        batches = _under(batches, batches.micro_batch_tokens // 2)


def _largest_for_all(
    batches: Batches, largest: Callable[[Batches], MicroBatch], small: tuple[int, int], have_room: HaveRoom
) -> MicroBatch:
    """Return the largest micro-batch for which all processes expect to have room, by tokens and bytes of a small one.

    None of them may try, and leave a pass in which the others wait for it. What a pass takes however few tokens it has
    counts with every token here, so that no process expects too little.
    """
    expected = PassBytes.through(small, small)
    while True:
        cut = largest(batches)
        tokens = batches.layout.tokens(batches.pairs.sizes, cut.pairs)
        # One pair is measured in any case.
        if have_room(expected.of(tokens) if len(cut.pairs) > 1 else 0):
            return cut
        batches = _under(batches, batches.micro_batch_tokens // 2)


def _under(batches: Batches, num_tokens: int) -> Batches:
    return dataclasses.replace(batches, micro_batch_tokens=max(1, num_tokens))
