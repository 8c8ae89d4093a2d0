"""The command line in this process: its exit status, as a shell would see it."""

from __future__ import annotations

import logging
import shlex
import sys

import pytest

from dpo_cli.cli import app


def call(arguments: str) -> int:
    """Run the program in this process and return its exit status."""
    from accelerate.state import AcceleratorState, GradientState

    logger = logging.getLogger("dpo_cli")
    before = logger.handlers, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dpo", *shlex.split(arguments)])
        # Whatever a library may ask for, such as leave to run a model's code, the user agrees.
        patch.setattr("builtins.input", lambda *_: "y")
        try:
            app(prog_name="dpo")
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            return stop.code
        finally:
            logger.handlers, logger.propagate = before
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return 0
