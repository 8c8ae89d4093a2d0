"""The trackers that a run's metrics are sent to beside `metrics.jsonl`; `Tracker` at the end lists them.

Accelerate talks to them; this module decides what each of them gets.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dpo_cli.errors import FAILED, UserError, from_os_error
from dpo_cli.reporting.safe_text import markdown_fence
from dpo_cli.settings import Settings
from dpo_cli.system.storage import make_folder, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

_TEXTS = "prompt", "answer", "chosen"
"""What a row of `samples.jsonl` has to be read."""

_SHOWN = ("eval/loss", "eval/rewards/accuracies")
"""The metrics by which TensorBoard compares the settings of runs."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers get of a run.

    Attributes:
        name: The name of its folder.
        folder: Where trackers write, and where their run ids are kept.
        done: Steps that are done.
    """

    name: str
    folder: Path
    done: int

    def kept(self, name: str) -> str:
        """Return the value that was kept under a name when the run was started, or an empty text."""
        file = self.folder / name
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""

    def keep(self, name: str, value: str) -> str:
        """Keep a value in the run's folder, for when the run is resumed."""
        write_text(self.folder / name, f"{value}\n")
        return value


class TrackerSettings(Settings):
    """What all trackers have in common."""

    package: ClassVar[str]

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Return Accelerate's tracker, not started yet."""
        raise NotImplementedError

    def made(self, *arguments: Any, **named: Any) -> GeneralTracker:
        """Make Accelerate's tracker of that package; its module takes torch with it."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[self.package](*arguments, **named)
        return tracker

    def describe(self, tracker: Any, settings: Mapping[str, Any], run: TrackedRun) -> None:
        """Pass the run's settings, as flat values, to a tracker that was started."""
        tracker.store_init_configuration(settings)

    def show_samples(self, tracker: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pass answers to held-out prompts, rows of `samples.jsonl` of one step, to a tracker that takes text."""


class TensorBoard(TrackerSettings):
    """TensorBoard, with its files in the run's folder; it has no projects."""

    type: Literal["tensorboard"] = "tensorboard"
    """Which tracker."""
    name: str | None = Field(None, pattern=r"^[^/\\.\x00][^/\\\x00]*$")
    """The run's name there; null: the name of the run's folder."""

    package: ClassVar[str] = "tensorboard"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Write below `trackers/NAME`, and discard the steps after the last one: they run again."""
        return self.made(self.name or run.name, run.folder, purge_step=run.done + 1 if run.done else 0)

    def describe(self, tracker: Any, settings: Mapping[str, Any], run: TrackedRun) -> None:
        """Write the settings into the file of the metrics; Accelerate would make two more runs of them, empty ones."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(dict(settings), dict.fromkeys(_SHOWN, 0.0)):
            tracker.writer.file_writer.add_summary(summary, 0)
        tracker.writer.flush()

    def show_samples(self, tracker: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show each prompt's answers by step, as the text that they are: TensorBoard reads Markdown."""
        for row in rows:
            texts = {name: str(row[name]) for name in _TEXTS}
            fence = markdown_fence("".join(texts.values()), 3)
            shown = "\n\n".join(f"{name}\n\n{fence}\n{text}\n{fence}" for name, text in texts.items())
            tracker.log({f"samples/{row['where']}": shown}, step=row["step"])


class InProject(TrackerSettings):
    """A tracker with projects and names of runs."""

    project: str = Field("dpo", min_length=1)
    """The project."""
    name: str | None = Field(None, min_length=1)
    """The run's name there; null: the name of the run's folder."""


class WandB(InProject):
    """Weights & Biases. A resumed run continues as the same run there."""

    type: Literal["wandb"] = "wandb"
    """Which tracker."""

    package: ClassVar[str] = "wandb"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Name the run by an id that is kept in its folder."""
        known = run.kept("wandb-id") or run.keep("wandb-id", uuid.uuid4().hex)
        return self.made(
            self.project, name=self.name or run.name, id=known, resume="allow", dir=str(run.folder.absolute())
        )

    def show_samples(self, tracker: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a table for each evaluation."""
        columns = list(rows[0])
        tracker.log_table("samples", columns, [list(row.values()) for row in rows], step=rows[0]["step"])


class MLflow(InProject):
    """MLflow, whose experiment is the project. A resumed run continues as the same run there."""

    type: Literal["mlflow"] = "mlflow"
    """Which tracker."""

    package: ClassVar[str] = "mlflow"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Continue the run whose id is kept in the run's folder, or start one."""
        return self.made(self.project, run_name=self.name or run.name, run_id=run.kept("mlflow-id") or None)

    def describe(self, tracker: Any, settings: Mapping[str, Any], run: TrackedRun) -> None:
        """Keep the id of the run; a run's settings cannot be written twice."""
        if not run.kept("mlflow-id"):
            run.keep("mlflow-id", tracker.tracker.info.run_id)
            tracker.store_init_configuration(settings)

    def show_samples(self, tracker: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a text for each evaluation."""
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        importlib.import_module("mlflow").log_text(text, f"samples/step-{rows[0]['step']:06d}.jsonl")


class Other(InProject):
    """A tracker that gets project and name, and nothing else."""

    named: ClassVar[str]

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Pass on project and name."""
        return self.made(self.project, **{self.named: self.name or run.name})


class Trackio(Other):
    """Trackio."""

    type: Literal["trackio"] = "trackio"
    """Which tracker."""

    package: ClassVar[str] = "trackio"
    named: ClassVar[str] = "name"


class SwanLab(Other):
    """SwanLab."""

    type: Literal["swanlab"] = "swanlab"
    """Which tracker."""

    package: ClassVar[str] = "swanlab"
    named: ClassVar[str] = "experiment_name"


class ClearML(Other):
    """ClearML, where a run is a task."""

    type: Literal["clearml"] = "clearml"
    """Which tracker."""

    package: ClassVar[str] = "clearml"
    named: ClassVar[str] = "task_name"


class Aim(InProject):
    """Aim, whose experiment is the project, with its repository in the run's folder."""

    type: Literal["aim"] = "aim"
    """Which tracker."""

    package: ClassVar[str] = "aim"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Pass on experiment and name."""
        return self.made(self.name or run.name, run.folder, experiment=self.project)


class CometML(TrackerSettings):
    """Comet, which names runs itself."""

    type: Literal["comet_ml"] = "comet_ml"
    """Which tracker."""
    project: str = Field("dpo", min_length=1)
    """The project."""

    package: ClassVar[str] = "comet_ml"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Pass on the project."""
        return self.made(self.project)


class DVCLive(TrackerSettings):
    """DVCLive, which writes where DVC expects it."""

    type: Literal["dvclive"] = "dvclive"
    """Which tracker."""

    package: ClassVar[str] = "dvclive"

    def connect(self, run: TrackedRun) -> GeneralTracker:
        """Pass on nothing."""
        return self.made()


Tracker = Annotated[
    TensorBoard | WandB | MLflow | Aim | ClearML | CometML | DVCLive | SwanLab | Trackio, Field(discriminator="type")
]
"""The closed union of all trackers, distinguished by `type`."""


def check_trackers(trackers: Sequence[Tracker], where: str) -> list[UserError]:
    """Say which trackers are not installed, without importing them."""
    return [
        UserError(
            f"the tracker `{tracker.type}` is not installed", where, f"install it with `pip install {tracker.package}`"
        )
        for tracker in trackers
        if importlib.util.find_spec(tracker.package) is None
    ]


def start_trackers(
    accelerator: Accelerator, trackers: Sequence[Tracker], settings: Mapping[str, Any], run: TrackedRun
) -> None:
    """Start trackers on the main process and pass them the run's settings.

    Raises:
        UserError: The disk fails, or a tracker does: its server, its login or its own settings.
    """
    if not trackers or not accelerator.is_main_process:
        return
    try:
        make_folder(run.folder)
        accelerator.log_with = [tracker.connect(run) for tracker in trackers]
        accelerator.init_trackers(run.name)
        for tracker, started in zip(trackers, accelerator.trackers, strict=True):
            tracker.describe(started, dict(_flat(settings)), run)
    except OSError as error:
        raise from_os_error(error, "starting the trackers", str(run.folder)) from error
    except Exception as error:
        # Trackers raise errors of their own if a server does not answer or nobody is logged in.
        names = ", ".join(tracker.type for tracker in trackers)
        hint = "log in or configure it, or leave it out; `--resume` continues the run"
        what = f"a tracker did not start ({names}): {type(error).__name__}: {error}"
        raise UserError(what, "`tracking`", hint, status=FAILED) from error


def show_samples(accelerator: Accelerator, trackers: Sequence[Tracker], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pass answers to held-out prompts, rows of `samples.jsonl` of one step, to trackers that take text.

    Returns:
        What trackers did not take and why: who may log numbers may yet not keep files there.
    """
    refused = []
    for tracker, started in zip(trackers, accelerator.trackers if accelerator.is_main_process else [], strict=False):
        try:
            tracker.show_samples(started, rows)
        except Exception as error:
            refused.append(f"the tracker `{tracker.type}` did not take answers: {type(error).__name__}: {error}")
    return refused


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested settings to dotted names with values that every tracker can show."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            shown = value if isinstance(value, (int, float, str, bool)) else str(value)
            flat.append((f"{prefix}{name}", shown))
    return flat
