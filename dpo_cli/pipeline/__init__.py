"""The three jobs, told as plain sequences. The only place that wires the rooms together."""

from dpo_cli.pipeline.evaluate import evaluate
from dpo_cli.pipeline.init import init
from dpo_cli.pipeline.prepare import prepare
from dpo_cli.pipeline.train import train

__all__ = ["evaluate", "init", "prepare", "train"]
