"""Runs of the program on a terminal of some width, and what is then on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len

from tests.conftest import dpo_command

_TOKENS = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """As much of a terminal as the program uses: it writes over lines, and goes up, and clears them.

    Args:
        width: Cells of a line.
    """

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.hidden = width, [""], False
        self.widest = 0
        self._row = self._column = 0

    def show(self, said: str) -> None:
        """Take what was written."""
        at = 0
        for found in _TOKENS.finditer(said):
            assert found.start() == at, f"no token: {said[at : found.start()]!r}"
            at = found.end()
            parameters, command, move, text = found.groups()
            if text:
                self._write(text)
            elif move == "\r":
                self._column = 0
            elif move == "\n":
                self._row += 1
                self.lines += [""] * (self._row == len(self.lines))
            else:
                self._obey(parameters, command)
        assert at == len(said), repr(said[at:])

    def _write(self, text: str) -> None:
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + text + line[self._column + len(text) :]
        self._column += len(text)
        self.widest = max(self.widest, cell_len(self.lines[self._row]))

    def _obey(self, parameters: str, command: str) -> None:
        if command == "A":
            self._row -= int(parameters or 1)
        elif command == "K":
            assert parameters == "2"
            self.lines[self._row] = ""
        elif parameters == "?25":
            self.hidden = command == "l"
        else:
            assert command == "m", (parameters, command)


class OnTerminal:
    """A run of the program on a terminal.

    Args:
        arguments: Those of the command line.
        width: Cells of a line.
        env: More environment variables.
    """

    def __init__(self, *arguments: object, width: int, env: Mapping[str, str] | None = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        # A size in the environment would count for more than that of the terminal.
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        surroundings = {**inherited, "TERM": "xterm-256color", **(env or {})}
        self.process = subprocess.Popen(
            dpo_command(*arguments), env=surroundings, start_new_session=True, preexec_fn=_control, **streams
        )
        os.close(theirs)
        self.width, self._seen = width, b""

    @property
    def said(self) -> str:
        """All that it has written so far, control codes included."""
        return self._seen.decode(errors="ignore")

    def until(self, text: str) -> None:
        """Read until it has written something."""
        while text not in self.said:
            assert self._read(), f"ended without saying {text!r}:\n{self.said}"

    def press(self, key: bytes) -> None:
        """Press a key."""
        os.write(self._ours, key)

    def wait(self) -> Screen:
        """Read to the end; return what is then on the screen."""
        while self._read():
            pass
        self.process.wait()
        os.close(self._ours)
        screen = Screen(self.width)
        screen.show(self.said)
        return screen

    def _read(self) -> bool:
        try:
            part = os.read(self._ours, 1 << 16)
        except OSError:
            # The other end is closed.
            return False
        self._seen += part
        return bool(part)


def _control() -> None:
    """Make standard input the terminal whose keys send signals."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
