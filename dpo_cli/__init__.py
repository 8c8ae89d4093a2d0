"""Direct Preference Optimization for Hugging Face causal language models: `dpo` on the command line, or from Python.

    import dpo_cli

    for step in dpo_cli.train("my.yaml"):
        print(step.number, step.metrics["loss"])

`prepare`, `train`, `evaluate`, `sample`, `report` and `export` do what the commands do. A configuration is a YAML file,
a mapping with the same settings, or a `Config`. What a person could see goes to a `Console`; without one, warnings
alone are logged.
"""

from __future__ import annotations

# Type checkers take it for that of `typing`, which takes longer to import than the program to answer an interrupt.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dpo_cli.errors import UserError
    from dpo_cli.jobs import evaluate, export, prepare, report, sample, train

__version__ = "0.1.0"
__all__ = ["UserError", "evaluate", "export", "prepare", "report", "sample", "train"]


def __getattr__(name: str) -> Any:
    """Import what a name of the package stands for when it is asked for, so that the package imports at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpo_cli import jobs

    return getattr(jobs, name)
