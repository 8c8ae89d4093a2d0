"""The YAML file as types: what can be set, how it is read, and what is said of what is wrong."""

from dpo_cli.config.loading import load_config
from dpo_cli.config.schema import Config, json_schema, resolved_yaml

__all__ = ["Config", "json_schema", "load_config", "resolved_yaml"]
