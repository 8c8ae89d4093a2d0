"""Real parts for the tests: a tokenizer trained on the demo pairs, a tiny random Llama, files, the program."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import yaml

from dpo_cli.modeling.allocator import hand_back_freed_memory, return_freed_memory
from tests.faults.ledger import PROPERTY, table
from tests.faults.zygote import Zygote
from tests.publishing import exported, exported_once, hub, hub_server  # noqa: F401
from tests.surroundings import move_out_of_home, stamped_files
from tests.waiting import PATIENCE

move_out_of_home()
# Read when the Hub's library is imported, which test modules do while they are collected.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
# As many test processes run as there are cores; threads of each would wait for each other's.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples every time, on however slow a machine; `make fuzz` searches for others.
hypothesis.settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).parent.parent
DEMO_PAIRS = ROOT / "configs" / "demo" / "pairs.jsonl"
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ROW_OF = {
    "instruction": {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"},
    "text": {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4"},
    "messages": {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1 and 2."}],
        "chosen": [{"role": "assistant", "content": "3"}],
        "rejected": [{"role": "assistant", "content": "4"}],
    },
    "repeated": {
        "prompt": "Add 1 and 2.",
        "chosen": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}],
        "rejected": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "4"}],
    },
    "conversations": {
        "chosen": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}],
        "rejected": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "4"}],
    },
    "hh": {
        "chosen": "\n\nHuman: Add 1 and 2.\n\nAssistant: 3",
        "rejected": "\n\nHuman: Add 1 and 2.\n\nAssistant: 4",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Add 1 and 2."}],
        "chosen": {"from": "gpt", "value": "3"},
        "rejected": {"from": "gpt", "value": "4"},
    },
    "ranked": {"prompt": "Add 1 and 2.", "responses": ["4", "3", "5"], "scores": [0.5, 2.0, -1.0]},
    "unpaired": {"prompt": "Add 1 and 2.", "completion": "3", "label": True},
    "compared": {"prompt": "Add 1 and 2.", "response_a": "4", "response_b": "3", "winner": "b"},
}
"""A good row of every shape."""


_MARKS = {"cli": ["program"], "faults": ["program", "faults"]}
"""What all tests of a folder are marked with."""

_CHECKOUT, _TOUCHED = pytest.StashKey[dict[str, int]](), pytest.StashKey[list[str]]()
_LLAMA_CPP = "dpo_cli.modeling.gguf.llama_worker"
_running: list[pytest.Item] = []
"""The test that runs, if one does."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults-journal", type=Path, metavar="FILE", help="write there what became of each fault, and go on from it"
    )
    parser.addoption("--untouched", action="store_true", help="fail if a file of the checkout is another afterwards")


def pytest_sessionstart(session: pytest.Session) -> None:
    # In the background of a script it is ignored, which the processes of tests would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # One process looks for all of its workers.
    if session.config.getoption("--untouched") and not hasattr(session.config, "workerinput"):
        session.config.stash[_CHECKOUT] = stamped_files(ROOT)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where the tests, which have folders of their own, wrote into the checkout."""
    before = session.config.stash.get(_CHECKOUT, None)
    if before is not None and (touched := before.items() ^ stamped_files(ROOT).items()):
        session.config.stash[_TOUCHED] = sorted({name for name, _ in touched})
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of some folders, and run what takes longest first: at the end, one process would wait."""
    for item in items:
        for name in _MARKS.get(item.path.parent.name, ()):
            item.add_marker(name)
        if "zygote" in getattr(item, "fixturenames", ()):
            item.add_marker("program")
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Know the test that runs, and undo what it does to the log and to the memory of this process."""
    logger = logging.getLogger("dpo_cli")
    before = logger.handlers, logger.propagate
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()
        logger.handlers, logger.propagate = before
        _free_what_is_left()


_MOST_LEFT_BYTES = 2**28
"""How much a process may grow before what tests have left in it is looked for, which takes a second."""

_after_freeing = 0
"""What the process held when that was last done."""


def _free_what_is_left() -> None:
    """Free models in cycles, and hand back the memory that runs keep for their next step: a worker has more tests."""
    global _after_freeing
    if _resident_bytes() > _after_freeing + _MOST_LEFT_BYTES:
        gc.collect()
        return_freed_memory()
        hand_back_freed_memory()
        _after_freeing = _resident_bytes()


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _require_mark(event: str, arguments: tuple[Any, ...]) -> None:
    """Fail a test that starts a program without being marked for it, so that `-m "not program"` is quick."""
    if event == "subprocess.Popen" and _running and not _running[-1].get_closest_marker("program"):
        program = Path(os.fsdecode(arguments[0])).name
        # Where llama.cpp is installed, exports let it read what they write, which takes half a second.
        if program.startswith(("python", "dpo", "bash")) and _LLAMA_CPP not in arguments[1]:
            pytest.fail(f"starts {program}, and is not marked `program`")


sys.addaudithook(_require_mark)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show what was touched, and what became of the cases of faults; their reports come from the workers as well."""
    if touched := config.stash.get(_TOUCHED, None):
        terminalreporter.section("files of the checkout that are others than before the tests")
        terminalreporter.write_line("\n".join(touched))
    reports = [report for some in terminalreporter.stats.values() for report in some]
    # A test takes its cases down as it is torn down; the reports before have none of them.
    torn_down = [report for report in reports if getattr(report, "when", "") == "teardown"]
    entries = [entry for report in torn_down for name, entry in report.user_properties if name == PROPERTY]
    if not entries:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(table(entries))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache out of the tests."""
    os.environ["DPO_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _hears_hangups() -> Iterator[None]:
    """Let what the tests start hear SIGHUP, also where `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, lambda number, frame: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def demo_rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in DEMO_PAIRS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict[str, str]]) -> Path:
    """A byte-level BPE tokenizer with a ChatML template, trained on the demo pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in demo_rows for text in row.values()), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random two-layer Llama with weights large enough that its answers differ."""
    return build_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer, seed=0)


def build_llama(folder: Path, tokenizer: Any, seed: int, **settings: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{**usual, **settings},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def patient_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for worker processes to start, instead of doing the work here until they have."""
    from dpo_cli.system import workers

    have_started = workers._have_started

    def wait(starting: Sequence[Future[int]]) -> bool:
        futures.wait(starting)
        return have_started(starting)

    monkeypatch.setattr(workers, "_have_started", wait)


@pytest.fixture
def pairs_file(tmp_path: Path, demo_rows: list[dict[str, str]]) -> Path:
    """Forty demo pairs."""
    return write_rows(tmp_path / "pairs.jsonl", demo_rows[:40])


@pytest.fixture
def write_config(tmp_path: Path, tiny_llama: Path, pairs_file: Path) -> Callable[..., Path]:
    """Write a configuration of a small, quick run; keyword arguments replace groups or add settings."""

    def write(name: str = "run", **groups: Any) -> Path:
        return make_config(tmp_path, tiny_llama, pairs_file, name, **groups)

    return write


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_config(folder: Path, tiny: Path, pairs: Path, name: str = "run", /, **groups: Any) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny)},
        "data": {"train": str(pairs), "eval": 0.2},
        "training": {"pairs_per_step": 4, "learning_rate": 1e-3},
        "checkpoints": {"every_steps": 2},
        # As many passes as an answer has tokens would be most of such a run.
        "evaluation": {"samples": 2, "max_new_tokens": 4},
        "output_dir": str(folder / "runs" / name),
    }
    for group, settings in groups.items():
        if isinstance(settings, dict) and isinstance(values.get(group), dict):
            values[group] = {**values[group], **settings}
        else:
            values[group] = settings
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def dpo_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpo_cli", *map(str, arguments)]


def run_dpo(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, in a process of its own."""
    return subprocess.run(
        dpo_command(*arguments),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts runs of the program in a tenth of a second."""
    zygote = Zygote(tmp_path_factory.mktemp("output"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def forked_dpo(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program as `run_dpo` does, in processes of which each spares the imports."""
    folder, numbers = tmp_path_factory.mktemp("printed"), itertools.count()

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        printed = folder / f"{next(numbers)}.txt"
        ended = zygote.run(*arguments, printed=printed, cwd=cwd, env=env)
        return subprocess.CompletedProcess(arguments, ended.status, printed.read_text(encoding="utf-8"), ended.said)

    return run


def read_metrics(run: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["split"] == split]


def differing_rows(run: Path, other: Path) -> list[str]:
    """Return the names of the files in which two runs have other rows, but for the clock."""
    ours, theirs = ({file.name: read_rows(file) for file in folder.glob("*.jsonl")} for folder in (run, other))
    return [name for name in sorted(ours | theirs) if _timeless(ours.get(name)) != _timeless(theirs.get(name))]


def _timeless(rows: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    return rows and without_clock(rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, file.read_text(encoding="utf-8").splitlines()))


def read_samples(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "samples.jsonl")


def without_clock(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what differs from run to run: speed, time, memory."""
    clock = ("tokens_per_second", "seconds", "memory_bytes")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]
