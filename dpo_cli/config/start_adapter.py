"""An adapter to go on from has its settings already: those that were not made are its own, others are an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import Config
from dpo_cli.config.tree import Tree
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import AdapterFolder, read_adapter
from dpo_cli.modeling.adapters.settings import ALL_LINEAR, is_named
from dpo_cli.system import plain_yaml


def with_settings_of_start(config: Config) -> Config:
    """Return the configuration with the settings of the adapter to go on from, where they were not made.

    What is wrong with that adapter is left to `check_inputs`.
    """
    if config.adapter is None or (found := _start_of(config)) is None:
        return config
    missing = {name: value for name, value in _settings(found).items() if name not in config.adapter.model_fields_set}
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=missing)})


def other_than_start(config: Config, tree: Tree) -> Iterator[UserError]:
    """Find settings of the adapter that differ from those of the one to go on from."""
    adapter = config.adapter
    if adapter is None or (found := _start_of(config)) is None:
        return
    for name, theirs in _settings(found).items():
        ours = getattr(adapter, name)
        if name in adapter.model_fields_set and ours != theirs and not (name == "targets" and _may_be(ours, found)):
            shown, other = (f"{one:g}" if isinstance(one, float) else plain_yaml.written(one) for one in (ours, theirs))
            what = f"`adapter.{name}` is {shown}, but {other} in the adapter that training goes on from"
            hint = f"leave `adapter.{name}` out: it is taken from `{adapter.start}`"
            yield UserError(what, tree.place(("adapter", name)), hint)


def _start_of(config: Config) -> AdapterFolder | None:
    """Return the adapter that training goes on from, if there is one that can be read."""
    if config.adapter is None or config.adapter.start is None:
        return None
    try:
        return read_adapter(Path(config.adapter.start))
    except UserError:
        return None


def _settings(found: AdapterFolder) -> dict[str, Any]:
    """Return the settings of an adapter that decide its layers and what they compute."""
    targets = found.targets if isinstance(found.targets, str) else list(found.targets)
    return {
        "rank": found.rank,
        "alpha": found.alpha,
        "targets": targets,
        "dora": found.dora,
        "rslora": found.rslora,
    }


def _may_be(targets: str | list[str], found: AdapterFolder) -> bool:
    """Tell whether targets may be the layers that an adapter has; that they are no others is seen in the model."""
    if targets == ALL_LINEAR:
        return True
    asked = [targets] if isinstance(targets, str) else targets
    named = [[layer for layer in found.layers if is_named(layer, one, pattern=one is targets)] for one in asked]
    return all(named) and {layer for some in named for layer in some} == set(found.layers)
