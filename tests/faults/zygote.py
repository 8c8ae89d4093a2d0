"""Runs of the program by the thousand: a process that has imported everything forks one for each.

Importing torch and transformers takes seconds, a run of the tiny model tenths. What is forked from here has never
run a backward pass, which torch would not survive, and ends without a word to its parent's exit handlers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
ROUND = "DPO_FAULTS"
"""The environment variable with the round of `make faults`, from 1; the cases of all tests are divided over several."""

_POLL_SECONDS = 0.005

_IMPORTED_LATE = (
    "pandas",
    "peft",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "pyarrow.pandas_compat",
    "pyarrow.vendored.version",
    "safetensors.torch",
    "torch._subclasses.fake_tensor",
    "transformers.convert_slow_tokenizer",
    "transformers.integrations.mistral",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.llama.modeling_llama",
)
"""What libraries import in the middle of a run."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, or minus the signal that killed it, and all that it said."""

    status: int
    said: str


class Running:
    """A run under way.

    Args:
        zygote: What forked it.
        pid: Its process.
        output: The file that takes what it says on both streams.
    """

    def __init__(self, zygote: Zygote, pid: int, output: Path) -> None:
        self._zygote, self.pid, self._output = zygote, pid, output

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._zygote.status(self.pid) is None

    def until(self, text: str) -> None:
        """Wait until it has said something.

        Raises:
            TimeoutError: It does not, or ends before.
        """

        def is_said() -> bool:
            if text in self.said:
                return True
            if not self.runs and text not in self.said:
                raise TimeoutError(f"ended without saying {text!r}:\n{self.said}")
            return False

        wait_until(is_said, lambda: f"has not said {text!r}:\n{self.said}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_after(self, cpu_seconds: float) -> bool:
        """Kill it when it has taken so much of a processor, which is the same moment on however busy a machine.

        Returns:
            Whether it was killed, and not finished before.
        """

        def is_due() -> bool:
            try:
                times = psutil.Process(self.pid).cpu_times()
            except psutil.NoSuchProcess:
                return True
            return not self.runs or bool(times.user + times.system >= cpu_seconds)

        wait_until(is_due, lambda: f"has not come so far:\n{self.said}")
        self.send(signal.SIGKILL)
        return self.wait().status == -signal.SIGKILL

    def wait(self) -> Ended:
        """Wait for its end.

        Raises:
            TimeoutError: It goes on for longer; it is killed then.
        """
        try:
            wait_until(lambda: not self.runs, lambda: f"still running after {PATIENCE:.0f} s:\n{self.said}")
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise
        status = self._zygote.status(self.pid)
        assert status is not None
        return Ended(status, self.said)


class Zygote:
    """The client's end: starts the process that forks, and asks it.

    Args:
        folder: Where the output of the runs is kept.
        env: Environment variables of all runs.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        surroundings = {**os.environ, **quiet, "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, "-m", "tests.faults.zygote", str(theirs.fileno())]
        # An interrupt of the tests is theirs to answer: when they are gone, so is the socket, and all runs with it.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], cwd=ROOT, env=surroundings, start_new_session=True
        )
        theirs.close()
        self._socket = ours
        self._folder, self._count = folder, 0
        self._statuses: dict[int, int] = {}
        self._pid: int | None = None

    def start(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        fault: tuple[str, Mapping[str, Any]] | None = None,
        printed: Path | None = None,
    ) -> Running:
        """Start `dpo` with some arguments.

        Args:
            arguments: Those of the command line.
            env: More environment variables; of PYTHONPATH modules are found that are not imported yet.
            cwd: The folder that it runs in.
            fault: A function as `module:name` and its keyword arguments, called in the new process before the
                command runs: it arranges for something to go wrong.
            printed: The file that takes standard output, if it should be told apart.
        """
        self._count += 1
        output = self._folder / f"run-{self._count}.txt"
        request = {
            "arguments": list(map(str, arguments)),
            "env": dict(env or {}),
            "cwd": str(cwd or ROOT),
            "output": str(output),
            "fault": fault,
            "printed": str(printed or output),
        }
        output.touch()
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while self._pid is None:
            self._read()
        pid, self._pid = self._pid, None
        return Running(self, pid, output)

    def run(self, *arguments: object, **more: Any) -> Ended:
        """Run `dpo` to its end."""
        return self.start(*arguments, **more).wait()

    def status(self, pid: int) -> int | None:
        """Return how a run ended, or None."""
        while pid not in self._statuses and select.select([self._socket], [], [], 0)[0]:
            self._read()
        return self._statuses.get(pid)

    def cpu_seconds(self) -> float:
        """Return what all runs that ended have taken of the processors."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.children_user + times.children_system)

    def close(self) -> None:
        """End the process that forks; runs under way are killed."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.wait(timeout=PATIENCE)

    def _read(self) -> None:
        """Take one answer: the process that was forked, or one that ended."""
        # One line at a time, so that nothing waits in a buffer that `select` does not see.
        line = b""
        while not line.endswith(b"\n"):
            found = self._socket.recv(1)
            if not found:
                raise ConnectionError("the zygote is gone")
            line += found
        answer = json.loads(line)
        if "status" in answer:
            self._statuses[answer["pid"]] = answer["status"]
        else:
            self._pid = answer["pid"]
            # Numbers come again after some ten thousand processes.
            self._statuses.pop(self._pid, None)


def _serve(connection: socket.socket) -> None:
    """Fork for every line that comes in; say who was forked and who ended."""
    waiting, running = b"", set()
    while True:
        if select.select([connection], [], [], _POLL_SECONDS if running else None)[0]:
            found = connection.recv(1 << 16)
            if not found:
                break
            waiting += found
            while b"\n" in waiting:
                line, waiting = waiting.split(b"\n", 1)
                pid = os.fork()
                if not pid:
                    connection.close()
                    _run(json.loads(line))
                running.add(pid)
                connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                answer = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
                connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _run(request: dict[str, Any]) -> None:
    """Be one run of the program, and end with its exit status."""
    from dpo_cli.cli import app

    status = 1
    try:
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.path[:0] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
        output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 2)
        os.dup2(os.open(request["printed"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
        sys.argv = ["dpo", *request["arguments"]]
        if ROUND in os.environ:
            from tests.faults.remembered import remember_counts

            remember_counts(Path(request["output"]).parent)
        if request["fault"]:
            where, keywords = request["fault"]
            module, _, name = where.partition(":")
            getattr(importlib.import_module(module), name)(**keywords)
        app(request["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _import_everything() -> None:
    """Import what a run imports, so that every fork finds it there."""
    import pkgutil

    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import dpo_cli
    from dpo_cli.reporting.pages import rendering

    for module in pkgutil.walk_packages(dpo_cli.__path__, "dpo_cli."):
        # A worker is a process of its own, with packages that need not be installed.
        if not module.name.endswith(("__main__", "_worker")):
            importlib.import_module(module.name)
    for name in (*_IMPORTED_LATE, "tests.faults.remembered"):
        importlib.import_module(name)
    # Compiles a thousand patterns, once in a process.
    get_checkpoint_conversion_mapping("llama")
    # Compiled once in a process, too.
    for name in rendering._ENVIRONMENT.list_templates(filter_func=lambda name: not name.endswith(".py")):
        rendering._ENVIRONMENT.get_template(name)


def main(arguments: Sequence[str]) -> None:
    """Serve the socket whose descriptor is the first argument."""
    _import_everything()
    # What is here now stays: no fork has to look through it, and so to copy it.
    gc.freeze()
    _serve(socket.socket(fileno=int(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
