"""llama.cpp as a reader of a GGUF file, where its package is installed: in a process of its own, on the CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.generation import Answer

WORKER = "dpo_cli.modeling.gguf.llama_worker"
"""The program of that process."""

_REASONS = ("error", "assert", "failed", "invalid")
"""Words of the lines in which llama.cpp says why it gave up; the first of them says most."""


def available() -> bool:
    """Tell whether the package is installed; it is not imported."""
    return importlib.util.find_spec("llama_cpp") is not None


@dataclass(frozen=True)
class LlamaCpp:
    """A GGUF file that llama.cpp has opened.

    Attributes:
        file: The file.
        worker: The process that has opened it.
        log: What that prints.
    """

    file: Path
    worker: subprocess.Popen[str]
    log: IO[str]

    def logps(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Return the log-probability, in nats, of each token of a response behind a prompt of at least one token."""
        return torch.tensor(self._ask("logps", list(prompt), list(response)), dtype=torch.float64)

    def greedy(self, prompt: Sequence[int], stops: Collection[int], max_new_tokens: int) -> Answer:
        """Return the answer of which every token is the likeliest."""
        tokens, ended = self._ask("greedy", list(prompt), sorted(stops), max_new_tokens)
        return Answer(tuple(tokens), ended)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text: special ones where it has their names, and none added to it."""
        found: list[int] = self._ask("tokens", text)
        return found

    def ends(self) -> set[int]:
        """Return the tokens at which llama.cpp ends an answer."""
        return set(self._ask("ends"))

    def begins(self) -> int | None:
        """Return the token that llama.cpp puts before a text, if it does."""
        found: int | None = self._ask("begins")
        return found

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Let the process do something; return what it found.

        Raises:
            UserError: llama.cpp cannot do that, or ended.
        """
        assert self.worker.stdin and self.worker.stdout
        try:
            print(json.dumps([name, arguments]), file=self.worker.stdin, flush=True)
            line = self.worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.worker.wait()
            ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise self._failed("llama.cpp ended while it read the file", ended)
        answer = json.loads(line)
        if "error" in answer:
            raise self._failed("llama.cpp cannot read the file", answer["error"])
        return answer["found"]

    def _failed(self, what: str, why: str) -> UserError:
        """Say what went wrong, and why: the first line in which llama.cpp says that, or else what is known here."""
        self.log.seek(0)
        reasons = (line.strip() for line in self.log if any(word in line.lower() for word in _REASONS))
        hint = "update the package `llama-cpp-python`, or uninstall it to have transformers alone read the file"
        return UserError(f"{what}: {next(reasons, why)}", str(self.file), hint, status=FAILED)


@contextlib.contextmanager
def opened(file: Path, positions: int) -> Iterator[LlamaCpp]:
    """Let llama.cpp open a file; with the context its process ends, and with that its memory is free.

    Args:
        file: The file.
        positions: The most tokens of a sequence that it is asked for.

    Raises:
        UserError: It cannot open the file.
    """
    # Imports are found where this process finds them, and not in the working directory.
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    # Threads that wait in a loop would keep others of a busy machine from their cores, and so those that they wait for.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, "-P", "-m", WORKER]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=log, env=environment) as worker:
            try:
                reader = LlamaCpp(file, worker, log)
                reader._ask("open", str(file), positions, torch.get_num_threads())
                yield reader
            finally:
                worker.kill()
                with contextlib.suppress(BrokenPipeError):
                    worker.communicate()
