"""Locks of the operating system: one process at a time, whatever became of the one before."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from dpo_cli.errors import UserError
from dpo_cli.system.locks import Locked, lock_beside, locked
from tests.waiting import PATIENCE

pytestmark = pytest.mark.program

HOLD = """
import sys
from pathlib import Path
from dpo_cli.system.locks import locked

with locked(Path(sys.argv[1]), "testing"):
    print("held", flush=True)
    sys.stdin.read()
"""
"""Holds a lock until its standard input is closed."""


def hold(path):
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / ".lock"


def test_the_lock_and_the_folders_made_for_it_are_gone_afterwards(path, tmp_path):
    with locked(path, "testing"):
        assert path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_else_came_into_the_folder_stays(path, tmp_path):
    with locked(path, "testing"):
        (path.parent / "result").touch()
    assert [p.name for p in path.parent.iterdir()] == ["result"]


def test_a_held_lock_is_refused_and_its_holder_named(path):
    with hold(path) as process:
        with pytest.raises(Locked, match=f"process {process.pid} on "), locked(path, "testing"):
            pass
        assert path.is_file()


def test_a_held_lock_is_waited_for_and_said_once(path):
    said = []
    with hold(path) as process:

        def release(holder):
            said.append(holder)
            threading.Timer(1, process.stdin.close).start()

        with locked(path, "testing", release):
            assert process.wait(timeout=PATIENCE) == 0
    assert len(said) == 1
    assert f"process {process.pid} on " in said[0]


def test_what_a_killed_process_left_does_no_harm(path):
    with hold(path) as process:
        process.kill()
    assert path.is_file()
    with locked(path, "testing"):
        pass
    assert not path.exists()


def test_a_lock_file_that_was_removed_meanwhile_protects_nobody_and_is_not_believed(path):
    """Whoever waited on a file that its holder removed takes the one that stands there now."""
    with hold(path) as process:
        with hold(lock_beside(path)):
            pass
        with locked(path, "testing", lambda holder: process.stdin.close()):
            assert path.is_file()
            with pytest.raises(Locked), locked(path, "testing"):
                pass


def test_many_processes_take_turns(tmp_path):
    """Each reads a number, waits, and writes the next: without the lock some would be lost."""
    script = """
import sys, time
from pathlib import Path
from dpo_cli.system.locks import locked
folder = Path(sys.argv[1])
for _ in range(5):
    with locked(folder / "x" / ".lock", "testing", lambda holder: None):
        count = int((folder / "count").read_text())
        time.sleep(0.01)
        (folder / "count").write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=PATIENCE) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "20"


def test_an_interrupted_wait_ends_at_once(path):
    def interrupt_soon(holder):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    with hold(path) as process:
        with pytest.raises(KeyboardInterrupt), locked(path, "testing", interrupt_soon):
            pass
        assert process.poll() is None


def test_a_disk_that_refuses_the_lock_is_an_error_that_says_what_it_was_for(tmp_path):
    (tmp_path / "file").touch()
    lock = locked(tmp_path / "file" / ".lock", "counting")
    with pytest.raises(UserError, match="counting failed: not a directory") as refused, lock:
        pass
    assert refused.value.where == str(tmp_path / "file")


def test_a_file_system_without_locks_is_named_in_a_warning(path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(path, "testing"):
        assert f"the file system of {path.parent} has no locks" in caplog.text
    assert not path.parent.exists()


def test_the_lock_file_of_one_that_came_after_the_folder_was_removed_is_left_alone(path):
    with locked(path, "testing"):
        shutil.rmtree(path.parent)
        process = hold(path)
    assert path.is_file()
    with pytest.raises(Locked), locked(path, "testing"):
        pass
    process.kill()
    process.communicate()
