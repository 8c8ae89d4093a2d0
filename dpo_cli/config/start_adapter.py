"""An adapter to go on from has its settings already: those that were not made are its own, others are an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import Config
from dpo_cli.config.tree import Tree
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import AdapterFolder, holds_adapter, is_adapter_id, read_adapter
from dpo_cli.modeling.adapters.settings import ALL_LINEAR, is_named
from dpo_cli.modeling.folders.model_names import look_up_model
from dpo_cli.settings import located
from dpo_cli.system import plain_yaml
from dpo_cli.training.run_folder import RunFolder, RunState

_OWN = ("rank", "alpha", "targets", "dora", "rslora")
"""Settings that an adapter's folder decides."""


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
    noted = []
    for name, theirs in _settings(found).items():
        ours = getattr(adapter, name)
        if name in adapter.model_fields_set and ours != theirs and not (name == "targets" and _may_be(ours, found)):
            place = tree.place(("adapter", name))
            if _is_of_a_run(place, tree):
                noted.append(f"`adapter.{name}` was {_shown(ours)} and is {_shown(theirs)}")
                continue
            what = f"`adapter.{name}` is {_shown(ours)}, but {_shown(theirs)} in the adapter that training goes on from"
            yield UserError(what, place, f"leave `adapter.{name}` out: it is taken from `{adapter.start}`")
    if noted:
        yield _changed(str(adapter.start), noted, tree.place(("adapter", "start")))


def changed_start(config: Config, changes: Mapping[str, str]) -> UserError | None:
    """Say that the adapter that training goes on from is another than when the run was started, if it is known.

    Args:
        config: What a run is to be resumed with.
        changes: Which of the settings are not those of the run, in words, by name.
    """
    if config.adapter is None or config.adapter.start is None or "adapter.start" in changes:
        return None
    own = [line for name, line in changes.items() if name.removeprefix("adapter.") in _OWN]
    return _changed(config.adapter.start, own, "`adapter.start`") if own else None


def _changed(start: str, what: Sequence[str], place: str) -> UserError:
    """Say that an adapter that training goes on from has changed since the run was started."""
    hint = (
        "restore its folder, or name where the adapter is now, as in `adapter.start=PATH`; to train from what is there "
        "now, start a new run in another `output_dir` with a configuration that leaves these settings out"
    )
    changed = f"the start adapter {located(start)} is not the one that the run was started with: {'; '.join(what)}"
    return UserError(changed, place, hint)


def _is_of_a_run(place: str, tree: Tree) -> bool:
    """Tell whether a place is in the config.yaml that a run has written, which has all settings of the adapter."""
    file = Path(tree.places.get((), ""))
    run = RunFolder(file.parent)
    written = file.name == run.config.name and run.state() in (RunState.STARTED, RunState.FINISHED)
    return written and place.startswith(str(file))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else plain_yaml.written(value)


def _start_of(config: Config) -> AdapterFolder | None:
    """Return the adapter that training goes on from, if there is one that can be read."""
    if config.adapter is None or config.adapter.start is None:
        return None
    name = config.adapter.start
    if is_adapter_id(name) and not holds_adapter(name) and look_up_model(name, "`adapter.start`"):
        return None
    try:
        return read_adapter(Path(name))
    except UserError:
        return None


def _settings(found: AdapterFolder) -> dict[str, Any]:
    """Return the settings of an adapter that decide its layers and what they compute."""
    settings = {name: getattr(found, name) for name in _OWN}
    return settings | {"targets": found.targets if isinstance(found.targets, str) else list(found.targets)}


def _may_be(targets: str | list[str], found: AdapterFolder) -> bool:
    """Tell whether targets may be the layers that an adapter has; that they are no others is seen in the model."""
    if targets == ALL_LINEAR:
        return True
    asked = [targets] if isinstance(targets, str) else targets
    named = [[layer for layer in found.layers if is_named(layer, one, pattern=one is targets)] for one in asked]
    return all(named) and {layer for some in named for layer in some} == set(found.layers)
