"""Whole forward and backward passes and optimizer steps of models of 1B and 8B weights, all of them random."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmark.shapes import SHAPES
from benchmark.work import Lengths, adapter_arithmetic, arithmetic
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_cli.config import as_config
from dpo_cli.data.records import TokenizedPair
from dpo_cli.doctor.speed import product_speed
from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.kernels import kernels_for
from dpo_cli.modeling.attention.trees import windows_of
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.compiled import compile_layers
from dpo_cli.modeling.layouts import PACKED
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.session import Session, started
from dpo_cli.reporting.console import Unattended
from gpu.clock import Check, NotBuilt

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense products of bfloat16 in a second, as the maker says, by what a card's name contains."""

LONG, SHORT = Lengths(200, 400, 400), Lengths(60, 90, 90)


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Attributes:
        shape: Which of `SHAPES`.
        num_pairs: Pairs of one pass.
        lengths: Tokens of each.
        settings: Groups of the configuration, beside the model's name.
        price: Whether to measure what deterministic kernels cost.
    """

    shape: str
    num_pairs: int
    lengths: Lengths
    settings: Mapping[str, Mapping[str, Any]]
    price: bool = False


def job(
    shape: str, num_pairs: int = 8, lengths: Lengths = LONG, *, price: bool = False, **settings: Any
) -> Callable[[Check], None]:
    """Return what measures a job."""
    return lambda check: measure(check, Job(shape, num_pairs, lengths, settings, price))


def measure(check: Check, asked: Job) -> None:
    """Take steps of one pass each; tell speed, share of the card's speed, largest memory, stops of the host.

    Raises:
        NotBuilt: The configuration does not know a setting.
    """
    asked = dataclasses.replace(asked, shape="tiny", num_pairs=2, lengths=Lengths(20, 30, 30)) if check.dry else asked
    with _session(asked) as session:
        check.reset_peak()
        policy = built(session, asked.shape)
        batch = laid_out(session, policy, asked)
        step = _step(session, policy)
        started = time.perf_counter()
        step(batch)
        facts = {"shape": asked.shape, "tokens": batch.input_ids.numel(), "pairs": asked.num_pairs}
        check.tell(**facts, first_step_seconds=round(time.perf_counter() - started, 2), peak_gib=check.peak_gib())
        stops = host_stops(check, lambda: step(batch))
        seconds = check.milliseconds(lambda: step(batch), 1 if check.dry else 3) / 1e3
        speeds = _shares(check, policy, asked, seconds)
        facts |= {
            "tokens_per_second": round(batch.input_ids.numel() / seconds),
            "pairs_per_second": asked.num_pairs / seconds,
        }
        check.tell(**facts, **speeds, step_seconds=round(seconds, 4), peak_gib=check.peak_gib(), host_stops=stops)
        if asked.price:
            _tell_price(check, lambda: step(batch), seconds)


def host_stops(check: Check, work: Callable[[], object]) -> list[str] | None:
    """Return what made the host wait for the device, as torch warns; None on a CPU."""
    if not check.on_cuda:
        work()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{one.filename.split('site-packages/')[-1]}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)
    ]


@contextlib.contextmanager
def _session(asked: Job) -> Iterator[Session]:
    """Start a session of the program under the settings of a job.

    Raises:
        NotBuilt: The configuration does not know one of them.
    """
    groups = {"model": {}, "training": {}, **asked.settings}
    groups["model"] = {"name": "random", **groups["model"]}
    try:
        config = as_config({**groups, "data": {"train": "none"}, "output_dir": "none"})
    except (UserError, ExceptionGroup) as error:
        raise NotBuilt("; ".join(str(one) for one in getattr(error, "exceptions", [error]))) from error
    with started(config, Unattended()) as session:
        yield session


def built(session: Session, shape: str) -> Policy:
    """Return a policy with random weights, made on the device, trained and held as the session says."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with session.accelerator.device:
        model = AutoModelForCausalLM.from_config(config, **session.held.built_as()).eval()
    model = session.held.take_over(model, session.accelerator.device)
    policy = Policy(model, session.trained, session.held)
    policy.read(PACKED)
    policy.place(session.accelerator, trained=True, recomputed=session.config.training.gradient_checkpointing)
    if session.config.training.compile is True:
        compile_layers(policy.model, "inductor" if session.accelerator.device.type == "cuda" else "eager")
    return policy


def laid_out(session: Session, policy: Policy, asked: Job) -> PairBatch:
    """Return a batch of pairs of random tokens on the device."""
    random = np.random.default_rng(0)

    def tokens(size: int) -> np.ndarray:
        return random.integers(5, policy.vocabulary, size).astype(np.int32)

    sizes = asked.lengths
    pairs = [
        TokenizedPair(tokens(sizes.prompt), tokens(sizes.chosen), tokens(sizes.rejected), f"pair {number}")
        for number in range(asked.num_pairs)
    ]
    device, windows = session.accelerator.device, windows_of(policy.model.config)
    layout, *_ = PACKED.with_kernels(kernels_for("auto", device.type), windows)
    return layout.batch(range(asked.num_pairs), pairs).to(device)


def _step(session: Session, policy: Policy) -> Callable[[PairBatch], None]:
    """Return what takes one optimizer step of one pass."""
    training, accelerator = session.config.training, session.accelerator
    optimizer = accelerator.prepare_optimizer(training.optimizer.over(policy.weights.trained(), 1e-6, 0.0))

    def step(batch: PairBatch) -> None:
        with policy.adding_up(last=True), accelerator.autocast():
            loss = -policy.scorer(batch).sum() / len(batch.targets)
        accelerator.backward(loss)
        policy.clip(training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _shares(check: Check, policy: Policy, asked: Job, seconds: float) -> dict[str, float | None]:
    """Return the necessary arithmetic of a step as a share of what the card does: measured here, and by its maker.

    A frozen base needs no products for gradients of its weights; what is recomputed is not necessary.
    """
    adapter = asked.settings.get("adapter")
    base = arithmetic(policy.model) if not adapter else arithmetic(_plain(asked.shape))
    work = base.forward(asked.lengths) * (2 if adapter else 3)
    work += 3 * adapter_arithmetic(_plain(asked.shape), adapter["rank"]).forward(asked.lengths) if adapter else 0
    per_second = work * asked.num_pairs / seconds
    measured = product_speed("bfloat16", check.device, 512 if check.dry else 8192)
    name = torch.cuda.get_device_name() if check.on_cuda else ""
    told = next((speed for card, speed in DATA_SHEET.items() if card in name), None)
    shares = {"of_measured_products": per_second / measured, "of_data_sheet": per_second / told if told else None}
    return {"tflops": per_second / 1e12, **shares}


def _plain(shape: str) -> Any:
    """Return a model without weights and without an adapter."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape], max_position_embeddings=8192))


def _tell_price(check: Check, step: Callable[[], None], seconds: float) -> None:
    """Take the same steps with any kernels: what the deterministic ones cost."""
    torch.use_deterministic_algorithms(False)
    try:
        free = check.milliseconds(step, 1 if check.dry else 3) / 1e3
    finally:
        torch.use_deterministic_algorithms(check.on_cuda)
    check.tell(any_kernels_step_seconds=round(free, 4), price_of_determinism=seconds / free - 1)
