"""The page of a run in a real browser: no error, no request, values at the pointer, no line that is too wide."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from dpo_cli.pipeline.report import write_report
from dpo_cli.training.run_folder import RunFolder
from tests.reporting.runs import SETTINGS, healthy, write_run
from tests.waiting import PATIENCE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.program,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]

LONG = "a/very/long/name/" * 30
PAIR = {"step": 120, "pair": 1, "where": LONG, "chosen_tokens": 5, "rewards/margins": -1.5}
TEXTS = {"prompt": "x" * 500, "chosen": "<script>document.title = 'owned'</script>", "rejected": "\u202e" + "y " * 500}
SAMPLE = {"where": LONG, "prompt": "z" * 300, "tokens": 3, "ended": False, "chosen": "c", "chosen_tokens": 1}


class Browser:
    """A tab of a headless Chromium, driven by its own protocol."""

    def __init__(self, profile: Path) -> None:
        self._numbers, self.events = itertools.count(1), []
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port, until = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (port.exists() and port.read_text().count("\n") >= 1):
            assert time.monotonic() < until
            time.sleep(0.05)
        host = f"127.0.0.1:{port.read_text().split()[0]}"
        with urlopen(f"http://{host}/json/list") as answer:
            tab = next(one for one in json.load(answer) if one["type"] == "page")
        self._socket = socket.create_connection(host.split(":"), timeout=PATIENCE)
        path, key = urlsplit(tab["webSocketDebuggerUrl"]).path, base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._file = self._socket.makefile("rb")
        while self._file.readline().strip():
            pass
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command and return its answer; events that come before it are kept."""
        number = next(self._numbers)
        data = json.dumps({"id": number, "method": method, "params": parameters}).encode()
        length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        self._socket.sendall(b"\x81" + length + b"\0\0\0\0" + data)
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _message(self) -> dict[str, Any]:
        size = self._file.read(2)[1] & 127
        if size >= 126:
            size = struct.unpack(">H" if size == 126 else ">Q", self._file.read(2 if size == 126 else 8))[0]
        return json.loads(self._file.read(size))

    def ask(self, expression: str) -> Any:
        """Return the value of an expression on the page."""
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, page: Path) -> None:
        self.events.clear()
        self.do("Page.navigate", url=page.as_uri())
        until = time.monotonic() + PATIENCE
        while self.ask("document.readyState") != "complete" or self.ask("location.href") != page.as_uri():
            assert time.monotonic() < until
            time.sleep(0.05)

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    samples = [{**SAMPLE, "step": step, "answer": f"word{step} " * 80} for step in (0, 120)]
    settings = SETTINGS.replace("some/model", LONG)
    run = write_run(folder / "run", healthy(), settings=settings, samples=samples, pairs=[{**PAIR, "text": TEXTS}])
    other = write_run(folder / ("o" * 200), healthy(60), settings=SETTINGS)
    return {
        "run": write_report([RunFolder(run)]),
        "runs": write_report([RunFolder(run), RunFolder(other)], folder / "both.html"),
    }


@pytest.mark.parametrize("name", ["run", "runs"])
def test_it_loads_without_an_error_and_asks_for_nothing(browser, pages, name):
    browser.open(pages[name])
    wrong = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert wrong == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if url != pages[name].as_uri()] == []
    assert "owned" not in browser.ask("document.title")


def test_a_script_that_is_not_the_pages_own_does_not_run(browser, pages, tmp_path):
    text = (
        pages["run"].read_text(encoding="utf-8").replace("</body>", "<script>document.title = 'owned'</script></body>")
    )
    (tmp_path / "changed.html").write_text(text, encoding="utf-8")
    browser.open(tmp_path / "changed.html")
    assert browser.ask("document.title") == "Report of run"


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "runs"])
def test_nothing_is_wider_than_the_window(browser, pages, name, scheme, width):
    browser.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(pages[name])
    assert browser.ask("document.documentElement.scrollWidth") <= width
    red, green, blue = json.loads(
        browser.ask("JSON.stringify(getComputedStyle(document.body).backgroundColor.match(/\\d+/g))")
    )
    assert (int(red) + int(green) + int(blue) < 200) == (scheme == "dark")


def test_a_pointer_and_the_keys_show_the_values_of_a_step(browser, pages):
    browser.do("Emulation.setDeviceMetricsOverride", width=1600, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(pages["run"])
    rows = {(row["split"], row["step"]): row for row in healthy()}
    tip = "document.querySelector('.plot .tip')"
    assert browser.ask(f"{tip}.hidden")
    browser.ask("document.querySelector('.plot').scrollIntoView()")
    left, top, width = json.loads(
        browser.ask(
            "(b => JSON.stringify([b.left, b.top, b.width]))(document.querySelector('.plot').getBoundingClientRect())"
        )
    )
    browser.do("Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 2, y=top + 20)
    shown = browser.ask(f"{tip}.innerText")
    assert "step 60" in shown
    for split, name in (("train", "training"), ("eval", "held out")):
        assert f"{name}: {rows[split, 60]['loss']:.4g}" in shown.replace(" (step 60)", "")
    browser.ask("document.querySelector('.plot').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.do("Input.dispatchKeyEvent", type=kind, key="End", code="End", windowsVirtualKeyCode=35)
    assert "step 120" in browser.ask(f"{tip}.innerText")
