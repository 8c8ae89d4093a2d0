"""Each point of variation is one file: made-up members are added to a copy of the package, and a run has them all.

A member is added by its own lines and by its name in the list; the schema, the settings page, the command line and the
run know of it from there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, dpo_command, make_config, read_metrics, write_rows

pytestmark = pytest.mark.program


@dataclass(frozen=True)
class Member:
    """A member that the package does not have.

    Attributes:
        file: The file that it is added to.
        code: Its own lines.
        before: What the code is put before, at the beginning of a line.
        entry: A pattern of the place in the list, and what it becomes.
    """

    file: str
    code: str
    before: str
    entry: tuple[str, str]


OPTIMIZER = Member(
    "training/optimizer.py",
    '''
class SGD(OptimizerSettings):
    """Plain steps along the gradient."""

    type: Literal["sgd"] = "sgd"
    """Which optimizer."""
    momentum: Decay = 0.0
    """What the step before leaves of itself in a step."""

    def build(self, groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's."""
        from torch.optim import SGD as TorchSGD

        return TorchSGD(groups, lr=learning_rate, momentum=self.momentum)

    def state_numbers(self, parameter: Tensor) -> int:
        """Count the momentum."""
        return parameter.numel() if self.momentum else 0
''',
    "Optimizer = Annotated[",
    (r"\| RMSprop,", "| RMSprop | SGD,"),
)

LAYOUT = Member(
    "modeling/layouts.py",
    '''
@dataclass(frozen=True)
class Single(Padded):
    """One pair a forward pass."""

    name: ClassVar[str] = "single"
    needs_proof: ClassVar[bool] = True

    def cut(self, sizes: PairSizes, indices: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
        """Cut between all pairs."""
        return [[index] for index in indices]
''',
    "PADDED, PACKED = ",
    (r"in \(PADDED, PACKED\)", "in (PADDED, PACKED, Single())"),
)

REFERENCE = Member(
    "preference/reference.py",
    '''
class Copied(Frozen):
    """Hold a copy of the policy."""

    type: Literal["copied"] = "copied"
    """Where the reference log-probabilities come from."""
''',
    "Reference = Annotated[",
    (r"\| NoReference, Field", "| NoReference | Copied, Field"),
)

SHAPE = Member(
    "data/pairs/shapes.py",
    '''
def quiz(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"question", "right", "wrong"}`."""
    asked, right, wrong = (str(row[name]) for name in ("question", "right", "wrong"))
    answers = [(Message("assistant", answer),) for answer in (right, wrong)]
    return [Pair((Message("user", asked),), *answers, origin)]
''',
    "FORMATS: dict",
    (
        r"^    \"compared\": Shape\(",
        '    "quiz": Shape(\n        quiz,\n        lambda row: row.keys() >= {"question", "right", "wrong"},\n'
        '        "there are `question`, `right` and `wrong`.",\n'
        '        {"question": "2 + 2?", "right": "4", "wrong": "5"},\n    ),\n    "compared": Shape(',
    ),
)

TRACKER = Member(
    "reporting/trackers.py",
    '''
class Lines(TrackerSettings):
    """A file with a line for each call."""

    type: Literal["lines"] = "lines"
    """Which tracker."""

    package: ClassVar[str] = "json"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Write into the folder of trackers."""
        import json

        from accelerate.tracking import GeneralTracker

        class Tracker(GeneralTracker):
            name, requires_logging_directory, tracker = "lines", False, None

            def log(self, values: dict[str, Any], step: int | None = None, **others: Any) -> None:
                with (run.folder / "lines.jsonl").open("a") as file:
                    file.write(json.dumps([step, sorted(values)]) + "\\n")

        return Tracker()
''',
    "Tracker = Annotated[",
    (r"\| Trackio, Field", "| Trackio | Lines, Field"),
)

TEXTS = Member(
    "data/pairs/text_checks.py",
    """
SHOUTED = TextCheck(
    "shouted",
    "warning",
    "the chosen response is in capitals",
    "The chosen response is in capitals: the model would learn to shout.",
    "Write it in small letters.",
    when="the chosen response has no small letter",
    bit=14,
    seen=lambda texts: texts.chosen.isupper(),
)
""",
    "TEXT_CHECKS = (",
    (r"^TEXT_CHECKS = \(", "TEXT_CHECKS = (\n    SHOUTED,"),
)

COMPARED = Member(
    "data/checkup/comparisons.py",
    """
def _longest(pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    indices = np.sort(np.concatenate([train, held_out]))
    return Found(indices[pairs.sizes.chosen[indices].argmax(keepdims=True)])


LONGEST = Comparison(
    "longest",
    "info",
    "no response is longer",
    "No chosen response is longer.",
    "Look at it.",
    when="no chosen response has more tokens",
    find=_longest,
)
""",
    "COMPARISONS = (",
    (r"^COMPARISONS = \(", "COMPARISONS = (\n    LONGEST,"),
)

TOKENS = Member(
    "data/tokens/token_checks.py",
    """
SHORT_PROMPT = TokenCheck(
    "short_prompt",
    "info",
    "the prompt has few tokens",
    "The prompt has few tokens.",
    "Nothing to do.",
    when="the prompt has fewer than 25 tokens",
    bit=13,
    holds=lambda result: len(result.pair.prompt) < 25,
)
""",
    "TOKEN_CHECKS = (",
    (r"^TOKEN_CHECKS = \(", "TOKEN_CHECKS = (\n    SHORT_PROMPT,"),
)

WHOLE = Member(
    "data/checkup/data_checks.py",
    """
FEW = DataCheck(
    "few_pairs",
    "info",
    "there are few pairs",
    "There are fewer than 1,000 pairs.",
    "Collect more.",
    when="there are fewer than 1,000 pairs",
    count=lambda check, data: Counted(check, len(data.indices) * (len(data.indices) < 1000), len(data.indices), ()),
)
""",
    "DATA_CHECKS = (",
    (r"^DATA_CHECKS = \(", "DATA_CHECKS = (\n    FEW,"),
)

MEMBERS = [OPTIMIZER, LAYOUT, REFERENCE, SHAPE, TRACKER, TEXTS, COMPARED, TOKENS, WHOLE]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package in which every member is added to its file."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "dpo_cli", folder / "dpo_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for member in MEMBERS:
        file = folder / "dpo_cli" / member.file
        text, entries = re.subn(*member.entry, file.read_text(encoding="utf-8"), flags=re.M)
        start = f"\n{member.before}"
        places = text.count(start)
        text = text.replace(start, f"\n{member.code.strip()}\n\n{start}")
        assert (entries, places) == (1, 1), member.file
        file.write_text(text, encoding="utf-8")
    return folder


def run(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that imports the copy."""
    path = os.pathsep.join([str(package), str(ROOT / "scripts")])
    # In the copy's folder, since Python looks where it was started before it looks anywhere else.
    done = subprocess.run(
        command, cwd=package, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def rows(tmp_path: Path, demo_rows: list[dict[str, str]]) -> Path:
    """Pairs in the made-up shape; two chosen responses are in capitals."""
    made = [
        {"question": row["instruction"], "right": row["chosen"], "wrong": row["rejected"]} for row in demo_rows[:20]
    ]
    for row in made[:2]:
        row["right"] = "SO IT IS."
    return write_rows(tmp_path / "quiz.jsonl", made)


def test_the_schema_and_the_written_pages_have_them(package):
    show = """
import json
import write_findings_page, write_settings_page
from dpo_cli.config import json_schema
print(json.dumps([json_schema(), write_settings_page.page(), write_findings_page.page()]))
"""
    schema, settings, findings = json.loads(run(package, sys.executable, "-c", show).stdout)
    groups = schema["$defs"]
    assert "sgd" in groups["SGD"]["properties"]["type"]["const"]
    assert "single" in groups["TrainingSettings"]["properties"]["layout"]["enum"]
    assert "quiz" in groups["DataSettings"]["properties"]["format"]["enum"]
    assert "shouted" in groups["DataSettings"]["properties"]["drop"]["items"]["enum"]
    assert "longest" not in groups["DataSettings"]["properties"]["drop"]["items"]["enum"]
    for heading in ("training.optimizer: sgd", "reference: copied", "tracking: lines"):
        assert f"\n### {heading}\n" in settings
    assert "\n| `shouted` | warning | the chosen response has no small letter |\n" in findings
    for name in ("longest", "short_prompt", "few_pairs"):
        assert f"\n| `{name}` | info | " in findings


def test_a_run_trains_with_them(package, tiny_llama, tmp_path, rows):
    config = make_config(
        tmp_path,
        tiny_llama,
        rows,
        reference="copied",
        tracking="lines",
        training={"optimizer": {"type": "sgd", "momentum": 0.5}, "layout": "single", "max_steps": 2},
        data={"drop": ["shouted"]},
    )
    said = run(package, *dpo_command("train", "--config", config)).stderr
    assert "checked: single gives the same as padded" in said
    assert "sgd (momentum 0.5)" in said
    assert re.search(r"\b2 shouted", said)
    run_folder = tmp_path / "runs" / "run"
    steps = read_metrics(run_folder)
    assert [row["step"] for row in steps] == [1, 2]
    assert steps[1]["rewards/margins"] != 0
    lines = [json.loads(line) for line in (run_folder / "trackers" / "lines.jsonl").read_text().splitlines()]
    assert {0, 1, 2} == {step for step, _ in lines}, "before step 1, and after each step"
    changed = dpo_command("train", "--config", config, "--resume", "training.optimizer.momentum=0.6")
    refused = subprocess.run(changed, cwd=package, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "`training.optimizer.momentum` was 0.5 and is 0.6" in refused.stderr


def test_the_check_of_the_data_reports_them(package, tiny_llama, tmp_path, rows):
    config = make_config(tmp_path, tiny_llama, rows)
    run(package, *dpo_command("prepare-data", "--config", config, "--out", tmp_path / "prepared"))
    report = json.loads((tmp_path / "prepared.report" / "report.json").read_text(encoding="utf-8"))
    counts = {finding["name"]: finding["count"] for finding in report["findings"]}
    assert (counts["shouted"], counts["longest"], counts["few_pairs"]) == (2, 1, 20)
    assert 0 < counts["short_prompt"] <= 20
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["statistics"]["short_prompt"] == counts["short_prompt"]
    assert [source["shape"] for source in manifest["statistics"]["sources"]] == ["quiz"]
