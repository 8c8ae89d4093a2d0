"""The YAML file as types: what can be set, how it is read, and what is said of what is wrong."""

from dpo_cli.config.loading import as_config, load_config
from dpo_cli.config.schema import Config, changeable, json_schema, resolved_yaml

__all__ = ["Config", "as_config", "changeable", "json_schema", "load_config", "resolved_yaml"]
