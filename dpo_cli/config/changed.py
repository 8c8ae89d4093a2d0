"""Which settings of a configuration are not as they are by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dpo_cli.config.schema import Config
from dpo_cli.system import plain_yaml


def changed_settings(config: Config) -> list[tuple[str, str, str]]:
    """Return the settings that differ from their defaults: the dotted name, the value and the default of each.

    A group of another type than by default is compared with the defaults of its own type. The run's folder is not
    listed: it always has a name of its own.
    """
    return [found for found in _changed(config, "") if found[0] != "output_dir"]


def _changed(group: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    shown = group.model_dump(mode="json")
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if not field.is_required() and value == default:
            continue
        if isinstance(value, BaseModel):
            if type(value) is not type(default) and "type" in type(value).model_fields:
                yield f"{prefix}{name}", str(shown[name]["type"]), _shown_type(default)
            yield from _changed(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", plain_yaml.written(shown[name]), "" if field.is_required() else _shown(default)


def _shown_type(default: Any) -> str:
    return str(getattr(default, "type", "null")) if isinstance(default, BaseModel) else _shown(default)


def _shown(default: Any) -> str:
    return plain_yaml.written(default.model_dump(mode="json") if isinstance(default, BaseModel) else default)
