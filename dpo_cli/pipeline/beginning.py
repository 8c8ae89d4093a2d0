"""What the reference of a run was before step 1, by the digests that the run has kept, and whether it is so still."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.config import Config
from dpo_cli.modeling.folders.identities import same_weights
from dpo_cli.modeling.policy import Policy
from dpo_cli.settings import located
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.training.checkpoints import PRECISION, beginning_of
from dpo_cli.training.run_folder import RunFolder, RunState, checkpoints_in


@dataclass(frozen=True)
class Beginning:
    """The reference of a run before step 1.

    Args:
        config: The configuration that is evaluated.
        fingerprints: What `noted_by` returned of it.
    """

    config: Config
    fingerprints: Mapping[str, str]

    @property
    def _noted(self) -> str | None:
        """The digest of the model that the reference is, or its base; None: it is not known."""
        return self.fingerprints.get("reference" if self.config.reference.model else "model")

    def is_identity(self, identity: str) -> bool:
        """Tell whether a reference without a start adapter is the run's by its identity, as far as that is known."""
        return self._noted is None or same_weights(identity, self._noted)

    def change(self, reference: Policy, precision: str) -> str:
        """Return a warning where what is to be the reference is not what it was when the run began; else nothing.

        Args:
            reference: The policy before step 1, or the model that is named for it.
            precision: What is computed in. Rounded weights say nothing about those that they were before.
        """
        named, adapter = self.config.reference.model, self.config.adapter
        if self._noted is None or (named and self.is_identity(reference.identity)):
            return ""
        part = reference.weights.began_with({"model": self._noted} if named else self.fingerprints)
        if part == "model" and self.fingerprints.get(PRECISION, precision) != precision:
            return ""
        if part == "model":
            what = f"`reference.model` {located(named)}" if named else f"`model.name` {located(self.config.model.name)}"
        elif part and adapter and adapter.start:
            what = f"`adapter.start` {located(adapter.start)}"
        else:
            return ""
        return (
            f"{what} is not what it was when the run began: its weights or settings are others; what is measured now "
            "compares with those of now, and the run's own figures with those of then"
        )


def noted_by(config: Config) -> Mapping[str, str]:
    """Return the digests of what the run in the folder of a configuration began with; empty where none are known."""
    return noted_in(RunFolder(Path(config.output_dir)))


def noted_in(folder: RunFolder) -> Mapping[str, str]:
    """Return the digests of what a run began with; empty where none are known."""
    # They serve a warning alone: a folder that cannot be read has none.
    with contextlib.suppress(OSError, ValueError):
        is_run = folder.state() in (RunState.STARTED, RunState.FINISHED)
        for kept in (folder.final, *reversed(checkpoints_in(folder.checkpoints))) if is_run else ():
            with contextlib.suppress(DamagedFolder):
                if found := beginning_of(kept):
                    return found
    return {}
