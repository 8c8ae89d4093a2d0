"""What `accelerate launch` says of FSDP: taken over into settings of this program, without effect, or refused by name.

Accelerate hands its configuration on in variables: `fsdp_offload_params: true` becomes FSDP_OFFLOAD_PARAMS=true.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

_USES_FSDP, _USES_PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_HIDDEN = ("FSDP_", "PARALLELISM_CONFIG_", _USES_FSDP, _USES_PARALLELISM)
"""How the variables begin that Accelerate and transformers would follow beside the configuration."""

_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""Those of FSDP 1, which also go by their place, from 1 on."""
_SHARDING = {"FULL_SHARD": "full", "HYBRID_SHARD": "hybrid", "NO_SHARD": "none"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

_REFUSED = {
    ("FSDP_OFFLOAD_PARAMS", "true"): "`training.offload: optimizer` keeps the optimizer's state in the host's memory",
    ("FSDP_AUTO_WRAP_POLICY", "size_based_wrap"): "choose TRANSFORMER_BASED_WRAP: each decoder layer is a group",
    ("FSDP_AUTO_WRAP_POLICY", "no_wrap"): "choose TRANSFORMER_BASED_WRAP: each decoder layer is a group",
    ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true"): "set it to false: what is kept of activations stays on the GPU",
}
"""Values that ask for something else, by variable, and what to do instead."""

_WITHOUT_EFFECT = {
    ("FSDP_VERSION", "1"): "weights are sharded by version 2",
    ("FSDP_BACKWARD_PREFETCH", "backward_post"): "the next layer is gathered ahead",
    ("FSDP_BACKWARD_PREFETCH", "no_prefetch"): "the next layer is gathered ahead",
    ("FSDP_FORWARD_PREFETCH", "true"): "the next layer is gathered ahead anyway",
    ("FSDP_STATE_DICT_TYPE", "full_state_dict"): "checkpoints are saved in shards, `final/` whole",
    ("FSDP_STATE_DICT_TYPE", "local_state_dict"): "checkpoints are saved in shards, `final/` whole",
    ("FSDP_USE_ORIG_PARAMS", "false"): "version 2 always uses the original parameters",
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"): "each process reads only its own shards",
    ("FSDP_SYNC_MODULE_STATES", "false"): "each process reads only its own shards",
}
"""Values that ask for another way to the same result, by variable, and what is done instead."""

_PARALLEL = {"TP": "tensor", "CP": "context", "SP": "sequence"}


@dataclass(frozen=True)
class Refusal:
    """A setting of Accelerate's that cannot be followed.

    Attributes:
        setting: It, as it is written there.
        hint: What to do.
    """

    setting: str
    hint: str


@dataclass(frozen=True)
class FsdpConfiguration:
    """What Accelerate's FSDP configuration asks for.

    Attributes:
        sharding: The value for `training.sharding`.
        recomputes: Whether activations are computed again in the backward pass.
        dtype: The value for `model.dtype`; None: Accelerate leaves it open.
        without_effect: Settings that change nothing here, each with the reason.
        refused: What cannot be followed.
    """

    sharding: str
    recomputes: bool
    dtype: str | None
    without_effect: tuple[str, ...]
    refused: tuple[Refusal, ...]


def uses_fsdp() -> bool:
    """Tell whether Accelerate is configured for FSDP."""
    return is_on(_USES_FSDP)


def is_on(name: str) -> bool:
    """Tell whether a variable switches something on."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def fsdp_configuration() -> FsdpConfiguration | None:
    """Read what Accelerate's FSDP configuration asks for; None: it is configured for something else."""
    if not uses_fsdp():
        return None
    strategies = _strategies()
    refused = [*_refused(), *_refused_strategies(strategies)]
    sharding = next((_SHARDING[name] for name in strategies if name in _SHARDING), "full")
    if is_on(_USES_PARALLELISM):
        sizes, wrong = _sizes()
        refused += wrong
        sharding = _sharding_of(sizes) if sizes and not wrong else sharding
    without_effect = [
        f"`{_written(name)}` ({why})" for (name, value), why in _WITHOUT_EFFECT.items() if _is(name, value)
    ]
    if classes := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        without_effect.append(f"`fsdp_transformer_layer_cls_to_wrap: {classes}` (each decoder layer is a group)")
    return FsdpConfiguration(
        sharding=sharding,
        recomputes=is_on("FSDP_ACTIVATION_CHECKPOINTING"),
        dtype=_DTYPES.get(os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()),
        without_effect=tuple(without_effect),
        refused=tuple(refused),
    )


@contextlib.contextmanager
def hidden_from_libraries() -> Iterator[None]:
    """Hide the FSDP configuration from Accelerate, which would wrap models, and transformers, which would load none."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_HIDDEN)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is(name: str, value: str) -> bool:
    return os.environ.get(name, "").lower() == value


def _written(name: str) -> str:
    """Return a setting as it is written in Accelerate's file."""
    return f"{name.lower()}: {os.environ[name]}"


def _refused() -> Iterator[Refusal]:
    """Yield what is refused whatever else is asked for."""
    for (name, value), hint in _REFUSED.items():
        if _is(name, value):
            yield Refusal(_written(name), hint)
    if os.environ.get("FSDP_IGNORED_MODULES"):
        yield Refusal(_written("FSDP_IGNORED_MODULES"), "leave it out: all modules are sharded")
    if (version := os.environ.get("FSDP_VERSION", "2")) not in ("1", "2"):
        yield Refusal(f"fsdp_version: {version}", "choose version 2")


def _strategies() -> list[str]:
    """Return the ways to shard that are asked for: none but what is there by default, unless there is another."""
    found = {}
    for name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"):
        value = os.environ.get(name, "true").upper()
        if value.isdecimal() and 1 <= int(value) <= len(_STRATEGIES):
            value = _STRATEGIES[int(value) - 1]
        # Whether weights are freed after the forward pass is what tells these two apart.
        found[{"TRUE": "FULL_SHARD", "FALSE": "SHARD_GRAD_OP"}.get(value, value)] = name
    return [name for name in found if name != "FULL_SHARD"] or ["FULL_SHARD"]


def _refused_strategies(strategies: list[str]) -> Iterator[Refusal]:
    """Yield the ways to shard that are unknown here, or that contradict each other."""
    hint = "choose FULL_SHARD or HYBRID_SHARD (FSDP 2: `fsdp_reshard_after_forward: true`)"
    if len(strategies) > 1 or any(name not in _SHARDING for name in strategies):
        for name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"):
            if name in os.environ and os.environ[name].upper() not in ("TRUE", "FULL_SHARD", "1"):
                yield Refusal(_written(name), hint)


def _sizes() -> tuple[dict[str, int], list[Refusal]]:
    """Return over how many processes weights are replicated and sharded, and what is wrong with that."""
    sizes, refused = {}, []
    for part in ("DP_REPLICATE", "DP_SHARD", *_PARALLEL):
        name = f"PARALLELISM_CONFIG_{part}_SIZE"
        text = os.environ.get(name, "1")
        sizes[part] = int(text) if text.isdecimal() else 0
        if part in _PARALLEL and sizes[part] != 1:
            refused.append(Refusal(_written(name), f"set it to 1: there is no {_PARALLEL[part]} parallelism"))
    if refused:
        return sizes, refused
    replicas, shards = sizes["DP_REPLICATE"], sizes["DP_SHARD"]
    written = f"parallelism_config_dp_replicate_size: {replicas}`, `parallelism_config_dp_shard_size: {shards}"
    num_ranks, here = (os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if num_ranks.isdecimal() and replicas * shards != int(num_ranks):
        hint = f"they have to multiply to the number of processes, {num_ranks}"
        refused.append(Refusal(written, hint))
    elif min(replicas, shards) > 1 and here.isdecimal() and shards != int(here):
        hint = f"weights are sharded within a machine: set the second to its number of processes, {here}"
        refused.append(Refusal(written, hint))
    return sizes, refused


def _sharding_of(sizes: dict[str, int]) -> str:
    """Return how weights are sharded by what number of processes."""
    if sizes["DP_SHARD"] == 1 and sizes["DP_REPLICATE"] > 1:
        return "none"
    return "hybrid" if sizes["DP_REPLICATE"] > 1 else "full"
