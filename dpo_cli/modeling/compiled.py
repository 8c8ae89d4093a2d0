"""What torch compiles: kernels and decoder layers. What is compiled too often is an error, never slow in silence."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.errors import FAILED, UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Result = TypeVar("Result")

_STRICT: dict[str, Any] = {
    "fail_on_recompile_limit_hit": True,
    # It would cut graphs by the buckets of gradients, which higher-order operators like FlexAttention do not allow.
    "optimize_ddp": False,
    # A scale or a soft cap is a constant of its layer: FlexAttention has no gradient where it captures one as a number
    # that may change.
    "specialize_float": True,
}
"""Settings of torch's compiler while anything of ours is called; they hold for the calling thread alone."""


class _Reasons(logging.Handler):
    """Notes why torch last compiled something anew, which its error does not tell."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Note the reason."""
        if isinstance(record.args, tuple) and "last reason" in record.msg:
            self.last = str(record.args[3]).strip()


_REASONS = _Reasons()


def hardened(compiled: Callable[..., Result], name: str) -> Callable[..., Result]:
    """Return what was compiled, so that compiling it too often is an error.

    Args:
        compiled: What `torch.compile` returned.
        name: What it is called in the error.
    """
    log = logging.getLogger("torch._dynamo.convert_frame")
    if _REASONS not in log.handlers:
        log.addHandler(_REASONS)

    @functools.wraps(compiled)
    def call(*arguments: Any, **options: Any) -> Result:
        with torch._dynamo.config.patch(**_STRICT):
            try:
                return compiled(*arguments, **options)
            except FailOnRecompileLimitHit as error:
                what = f"torch compiled {name} {torch._dynamo.config.recompile_limit} times, each pass needing another"
                hint = "set `training.compile: false` and `training.attention: varlen`, and report the reason above"
                raise UserError(what, _REASONS.last or None, hint, status=FAILED) from error

    return call


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model: those that transformers can compute again, without those within others."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    within = {id(inner) for layer in found for inner in layer.modules() if inner is not layer}
    return [layer for layer in found if id(layer) not in within]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Let the decoder layers of a model be compiled when they are first called; return how many there are."""
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = hardened(layer._compiled_call_impl, "a decoder layer")
    return len(layers)


def leave_uncompiled(model: PreTrainedModel) -> None:
    """Let the decoder layers of a model be called as they are."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None


@contextlib.contextmanager
def uncompiled(model: PreTrainedModel) -> Iterator[None]:
    """Call the decoder layers of a model as they are while the context lasts, in which shapes change at every call."""
    compiled = {layer: layer._compiled_call_impl for layer in decoder_layers(model)}
    leave_uncompiled(model)
    try:
        yield
    finally:
        for layer, call in compiled.items():
            layer._compiled_call_impl = call


def are_compiled(model: PreTrainedModel) -> bool:
    """Tell whether decoder layers of a model are called as `compile_layers` made them."""
    return any(layer._compiled_call_impl is not None for layer in decoder_layers(model))
