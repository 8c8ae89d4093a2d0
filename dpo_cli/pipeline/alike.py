"""What the processes of a run do and read: they must be asked for the same, and have the same models and pairs.

A process that has others is named. Compared are samples of the weights, before any are loaded.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_cli.config import Config
from dpo_cli.errors import UserError, raise_all
from dpo_cli.modeling.folders.samples import sampled_adapter_digest, sampled_digest
from dpo_cli.pipeline.session import Session
from dpo_cli.pipeline.surroundings import differing, errors_of, ranks_have

_START = "`adapter.start`"


@dataclass(frozen=True)
class Job:
    """What a process is asked to do, and what it reads for it.

    Attributes:
        host: The name of its machine.
        asked: The options of the command.
        models: A digest of what each setting names as a model, by setting.
    """

    host: str
    asked: Mapping[str, str]
    models: Mapping[str, str]

    @classmethod
    def of_this(cls, config: Config, asked: Mapping[str, object], models: Mapping[str, str | None]) -> Job:
        """Describe what this process does.

        Args:
            config: What the models may bring along.
            asked: The options of the command.
            models: What settings name as a model, if they do.

        Raises:
            UserError: A model cannot be read.
        """
        digests = {
            # Training goes on from an adapter on `model.name`, wherever the base is that the adapter names.
            where: sampled_adapter_digest(name) if where == _START else sampled_digest(name, config.model.trust)
            for where, name in models.items()
            if name
        }
        return cls(socket.gethostname(), {name: str(value) for name, value in asked.items()}, digests)


def check_job(session: Session, asked: Mapping[str, object], models: Mapping[str, str | None]) -> None:
    """Compare what the processes are asked to do, and what they read for it.

    Args:
        session: Knows the other processes.
        asked: The options of the command.
        models: What settings name as a model, if they do.

    Raises:
        UserError: They differ; an `ExceptionGroup` where they do in several ways.
    """
    if session.accelerator.num_processes == 1:
        return
    raise_all(_differences(session.of_all(Job.of_this(session.config, asked, models))))


def named_models(config: Config) -> dict[str, str | None]:
    """Return what a configuration names as models and adapters, by setting."""
    start = config.adapter.start if config.adapter else None
    return {"`model.name`": config.model.name, "`reference.model`": config.reference.model, _START: start}


def check_pairs(session: Session, fingerprint: str, where: str) -> None:
    """Compare the pairs that the processes have read, by a digest.

    Raises:
        UserError: They differ.
    """
    everywhere = session.of_all((fingerprint, socket.gethostname()))
    found, hosts = zip(*everywhere, strict=True)
    hint = "copy the same data and the same tokenizer to every machine, or share a disk"
    raise_all(_unlike(found, hosts, "other pairs", where, hint))


def _differences(everywhere: Sequence[Job]) -> Iterator[UserError]:
    """Yield in what processes differ that do the same job, by rank."""
    hosts = [one.host for one in everywhere]
    asked = differing([one.asked for one in everywhere], hosts, "other options")
    yield from errors_of(asked, "the command line", "start every process with the same command")
    models = [one.models for one in everywhere]
    named = ", ".join(where for where in models[0] if any(one.get(where) != models[0][where] for one in models))
    hint = "copy the same model to every machine, or share a disk"
    yield from _unlike([str(one) for one in models], hosts, "another model", named, hint)


def _unlike(found: Sequence[str], hosts: Sequence[str], what: str, where: str, hint: str) -> Iterator[UserError]:
    """Yield which processes have found something else than rank 0, by rank."""
    if others := [rank for rank, one in enumerate(found) if one != found[0]]:
        yield UserError(f"{ranks_have(others, hosts)} {what} than rank 0", where, hint)
