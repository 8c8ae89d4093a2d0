"""A session: what one process of a job is asked to do, whom it speaks to, and what it computes with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from transformers.utils import logging as hf_logging

from dpo_cli.config import Config
from dpo_cli.errors import FAILED, UserError, raise_all
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.allocator import return_freed_memory
from dpo_cli.modeling.attention.kernels import kernels_for
from dpo_cli.modeling.determinism import deterministic_kernels
from dpo_cli.modeling.held import FLOAT32, Held, Split, held_as
from dpo_cli.modeling.placement import Alone, Placement, placement_for
from dpo_cli.modeling.precision import PRECISIONS, Precision, precision_of
from dpo_cli.modeling.sharded_sizes import Sharding
from dpo_cli.modeling.trained import Trained, Whole
from dpo_cli.pipeline.assumed import AbsentDevices
from dpo_cli.pipeline.out_of_memory import during, reported
from dpo_cli.pipeline.surroundings import check_surroundings
from dpo_cli.reporting.console import Console
from dpo_cli.system.assumed_devices import AssumedDevices
from dpo_cli.system.fsdp_configuration import hidden_from_libraries
from dpo_cli.system.signals import StopSignals
from dpo_cli.training.ranks import Progress, gathering, watched

Found = TypeVar("Found")


@dataclass(frozen=True)
class Session:
    """What a process has for the whole of a job.

    Attributes:
        config: What to do.
        console: What a person sees.
        signals: Those that ask to stop.
        accelerator: Knows device, precision and the other processes.
        progress: Is told how far the job is, for other processes to see.
        placement: Where weights are among the processes.
        assumed: The devices that a forecast is for, where they are not those that are here.
    """

    config: Config
    console: Console
    signals: StopSignals
    accelerator: Accelerator
    progress: Progress
    placement: Placement
    assumed: AssumedDevices | None = None

    @property
    def precision(self) -> Precision:
        """What is computed in."""
        return precision_of(self.accelerator.mixed_precision)

    @property
    def shards(self) -> Sharding | None:
        """How weights are sharded over processes; None: not at all."""
        sharding = self.config.training.sharding
        if sharding == "none" or self._num_processes == 1:
            return None
        return Sharding(self._on_this_machine if sharding == "hybrid" else self._num_processes)

    @property
    def _num_processes(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def _on_this_machine(self) -> int:
        """How many processes there are on this machine."""
        here = os.environ.get("LOCAL_WORLD_SIZE", self._num_processes)
        return self.assumed.per_machine if self.assumed else int(here)

    @property
    def trained(self) -> Trained:
        """What of the policy trains."""
        adapter = self.config.adapter
        return Whole() if adapter is None else Adapted(adapter, self.config.training.seed, self.config.model.name)

    @property
    def held(self) -> Held:
        """How the weights of the run's models are held."""
        quantize = self.config.model.quantize
        return held_as(quantize, self.precision.name) if quantize else self.held_beside

    @property
    def held_beside(self) -> Held:
        """How other models than the run's are held, which train not at all: they are never quantized."""
        weights = self.config.model.weights
        if self.config.adapter is not None:
            # What an adapter is put beside does not train: it lacks nothing.
            name = self.precision.name if weights in ("auto", "split") else weights
            return held_as(name, name)
        on_gpu = self.precision.name == "bfloat16" and self.accelerator.device.type == "cuda"
        if weights == "float32" or not (weights == "split" or on_gpu):
            return FLOAT32
        training = self.config.training
        return Split(gradients=training.optimizer.gradients, low_on_host=training.offload is not None)

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Name what is at hand: to ranks that wait for this one, and on an error that says that memory has run out."""
        with self.progress.during(what), during(what):
            yield

    def under(self, config: Config) -> Session:
        """Return the same session with other settings."""
        return replace(self, config=config)

    def on(self, assumed: AssumedDevices) -> Session:
        """Return the same session, for a forecast alone, on devices that are not here."""
        absent = AbsentDevices.computing(assumed.count, self.config.model.computed_in)
        accelerator = cast("Accelerator", absent)
        return replace(self, accelerator=accelerator, placement=Alone(accelerator), assumed=assumed)

    def agreed(self, found: Found) -> Found:
        """Return what the first process has found, in all of them."""
        if self.assumed:
            return found
        agreed: Found = broadcast_object_list([found])[0]
        return agreed

    def of_all(self, found: Found) -> list[Found]:
        """Return what each process has found."""
        if self.assumed:
            return [found]
        everywhere: list[Found] = gather_object([found])
        return everywhere


@contextlib.contextmanager
def started(
    config: Config, console: Console, signals: StopSignals | None = None, *, trains: bool = False
) -> Iterator[Session]:
    """Start a session: in one process, or in one of those that torchrun or accelerate launched.

    Args:
        config: What to do.
        console: What a person sees.
        signals: Those that ask to stop, or None.
        trains: Whether the job takes steps.

    Raises:
        UserError: Accelerate cannot start, an operation of the job has no deterministic kernel, memory ran out, or the
            device cannot do what a setting asks for; an `ExceptionGroup` where there are several such settings.
    """
    raise_all(_refused_by_device(config, trains=trains))
    with hidden_from_libraries(), deterministic_kernels(config.training.deterministic):
        accelerator = start_accelerator(config)
        try:
            told = watched(accelerator, config.training.rank_timeout, Console().error)
            with told as progress, reported(config), _placed(config):
                placement = placement_for(accelerator, config.training.sharding)
                yield Session(config, console, signals or StopSignals(), accelerator, progress, placement)
            accelerator.end_training()
        finally:
            # Accelerate keeps precision and processes for as long as Python runs; the next session may have others.
            AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def _placed(config: Config) -> Iterator[None]:
    """Add to errors that name a setting where that was made."""
    try:
        yield
    except UserError as error:
        error.where = config.placed(error.where)
        raise


def _refused_by_device(config: Config, *, trains: bool) -> Iterator[UserError]:
    """Yield what is wrong with settings that ask for what the device cannot do."""
    accelerator, training = torch.accelerator.current_accelerator(check_available=True), config.training
    on_cpu = accelerator is None
    device = "cpu" if accelerator is None or parse_flag_from_env("ACCELERATE_USE_CPU") else accelerator.type
    try:
        precision_for(config.model.computed_in, config.where("model.dtype", "model.weights"), on_cpu=on_cpu)
    except UserError as error:
        yield error
    try:
        kernels_for(training.attention, device, config.where("training.attention"))
    except UserError as error:
        yield error
    if trains and training.offload and device == "cpu":
        what = f"`training.offload: {training.offload}` keeps in the host's memory what is there anyway"
        yield UserError(what, config.where("training.offload"), "leave it out on a CPU: it is for GPUs")


@contextlib.contextmanager
def assuming(config: Config, console: Console, assumed: AssumedDevices) -> Iterator[Session]:
    """Start a session for a forecast alone, on devices that are not here: no process group, and no device of any kind.

    Raises:
        UserError: The attention that is asked for does not run there.
    """
    absent = AbsentDevices.computing(assumed.count, config.model.computed_in)
    hf_logging.set_verbosity_error()
    kernels_for(config.training.attention, absent.device.type, config.where("training.attention"))
    accelerator = cast("Accelerator", absent)
    yield Session(config, console, StopSignals(), accelerator, Progress(), Alone(accelerator), assumed)


def start_accelerator(config: Config) -> Accelerator:
    """Start Accelerate.

    Raises:
        UserError: Accelerate cannot start; or the processes of the run differ in what they have to have alike.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        return_freed_memory()
    torch.manual_seed(config.training.seed)
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        # Kernels that are not installed, settings that look odd: what matters of it is checked and said here.
        hf_logging.set_verbosity_error()
    settings: dict[str, Any] = {
        "cpu": on_cpu,
        "mixed_precision": precision_for(config.model.computed_in, on_cpu=on_cpu),
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    }
    try:
        with gathering(config.training.rank_timeout, Console().error):
            accelerator = Accelerator(**settings)
            check_surroundings(config, accelerator.device, accelerator.process_index, accelerator.num_processes)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "check what `accelerate config` has set, and the environment variables that begin with ACCELERATE_"
        raise UserError(
            f"Accelerate cannot start: {reason}", "Accelerate's own configuration", hint, status=FAILED
        ) from error
    return accelerator


def precision_for(dtype: str, where: str = "`model.dtype`", *, on_cpu: bool) -> str:
    """Return Accelerate's name of the precision that is computed in.

    Args:
        dtype: What `model.dtype` says.
        where: Where it says so.
        on_cpu: Whether there is nothing but a CPU.

    Raises:
        UserError: This device does not compute in it.
    """
    # Older cards only emulate it, slower than float32.
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        return "bf16" if has_bfloat16 else "no"
    if dtype == "bfloat16" and torch.cuda.is_available() and not has_bfloat16:
        what = f"bfloat16 is not available on this GPU ({torch.cuda.get_device_name()}), which only emulates it"
        raise UserError(what, where, "set `model.dtype` to float32 or float16, or to auto")
    if on_cpu and not PRECISIONS[dtype].on_cpu:
        able = " or ".join(precision.name for precision in PRECISIONS.values() if precision.on_cpu)
        hint = f"use {able} here; {dtype} needs a GPU"
        raise UserError(f"`model.dtype: {dtype}` cannot be computed in on a CPU", where, hint)
    return PRECISIONS[dtype].mixed
