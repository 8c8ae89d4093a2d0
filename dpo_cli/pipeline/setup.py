"""What the three jobs begin with: checked inputs, an accelerator, the tokenizer, the pairs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config import Config
from dpo_cli.data.sources import check_source
from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.loading import check_model
from dpo_cli.reporting.console import Console

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray

    from dpo_cli.data.prepared import PreparedPairs
    from dpo_cli.data.tokenize import PairTokenizer
    from dpo_cli.evaluation.evaluate import PairResult


def check_inputs(config: Config, *, needs_train: bool = True) -> list[UserError]:
    """Find what the configuration names and is not there, before anything slow is imported."""
    problems = [check_model(config.model.name, "`model.name`")]
    if config.reference.model is not None:
        problems.append(check_model(config.reference.model, "`reference.model`"))
    template = config.model.chat_template
    if template is not None and template != "plain" and not _is_file(template):
        hint = "name a Jinja file, `plain`, or null for the tokenizer's own"
        shown = template if len(template) <= 60 else f"{template[:57]}…"
        problems.append(UserError(f"there is no chat template `{shown}`", "`model.chat_template`", hint))
    if config.data.train is None and needs_train:
        hint = "name a data file: `data: {train: pairs.jsonl}`"
        problems.append(UserError("`data.train` is missing", "the configuration", hint))
    for setting, sources in (("train", config.data.train), ("eval", config.data.eval)):
        if isinstance(sources, (str, list)):
            problems += [check_source(source, f"`data.{setting}`") for source in as_list(sources)]
            if not sources:
                problems.append(UserError(f"`data.{setting}` is empty", None, "name at least one source"))
    return [problem for problem in problems if problem]


def _is_file(name: str) -> bool:
    """Tell whether there is such a file; a template's own text, say, is too long for a name."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def named_inputs(config: Config) -> list[str]:
    """Return what the configuration names as a model, a template or data."""
    named = [config.model.name, config.model.chat_template, config.reference.model]
    for sources in (config.data.train, config.data.eval):
        if isinstance(sources, (str, list)):
            named += as_list(sources)
    return [name for name in named if name]


def as_list(sources: str | Sequence[str]) -> list[str]:
    """Return a source, or several, as a list."""
    return [sources] if isinstance(sources, str) else list(sources)


def start_accelerator(config: Config, *, project_dir: Path | None = None) -> Accelerator:
    """Start Accelerate: one process, or one of those that torchrun or accelerate launched.

    Raises:
        UserError: The precision or a tracker is not to be had here, or Accelerate is configured to
            accumulate gradients, which is what `training.pairs_per_step` does.
    """
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from dpo_cli.errors import raise_all
    from dpo_cli.modeling.allocator import return_freed_memory
    from dpo_cli.reporting.trackers import check_trackers

    if project_dir:
        raise_all(check_trackers(config.tracking, "`tracking`"))
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        return_freed_memory()
    torch.manual_seed(config.training.seed)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=_precision(config.model.dtype, on_cpu=on_cpu),
        log_with=list(config.tracking) or None if project_dir else None,
        project_dir=str(project_dir) if project_dir else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.gradient_accumulation_steps != 1:
        hint = "set it to 1 there; `training.pairs_per_step` decides how many pairs make up a step"
        raise UserError("Accelerate is configured to accumulate gradients", "its configuration", hint)
    return accelerator


def _precision(dtype: str, *, on_cpu: bool) -> str:
    """Return Accelerate's name of the precision that is computed in."""
    import torch

    if dtype == "auto":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return "bf16" if has_bfloat16 else "no"
    if dtype == "float16" and on_cpu:
        hint = "use float32 or bfloat16 here; float16 needs a GPU"
        raise UserError("float16 cannot be trained on a CPU", "`model.dtype`", hint)
    return {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def load_tokenizer(config: Config, name: str) -> tuple[Any, PairTokenizer]:
    """Load a model's tokenizer and fit it with template and length rule."""
    from dpo_cli.data.tokenize import PLAIN, PairTokenizer, read_template
    from dpo_cli.modeling import loading

    tokenizer = loading.load_tokenizer(name)
    template = read_template(config.model.chat_template)
    tokenize = PairTokenizer(
        tokenizer,
        template=template,
        max_length=config.data.max_length,
        on_too_long=config.data.on_too_long,
    )
    if template is not None:
        # What is saved with the model is the template it was trained on, or none.
        tokenizer.chat_template = None if template == PLAIN else template
    return tokenizer, tokenize


def prepared_pairs(
    config: Config,
    sources: Sequence[str],
    tokenize: PairTokenizer,
    console: Console,
    folder: Path | None = None,
) -> PreparedPairs:
    """Return the pairs of some sources, prepared now or by an earlier run.

    Args:
        config: Decides how rows are read.
        sources: Data files, folders, Hub ids, or one prepared folder.
        tokenize: Template and length rule.
        console: Says what is done.
        folder: Where to keep them, or None for the cache.
    """
    from dpo_cli.data import prepared
    from dpo_cli.data.prepare import prepare

    if any(prepared.is_prepared(source) for source in sources):
        if len(sources) > 1:
            hint = "name one prepared folder alone, or the raw sources"
            raise UserError("a prepared folder cannot be mixed with other sources", ", ".join(sources), hint)
        return prepared.open_for(Path(sources[0]), tokenize)
    if folder and (problem := _check_out(folder)):
        raise problem
    data = config.data
    digest = prepared.fingerprint(sources, data.format, data.on_bad_row, tokenize)
    target = folder or prepared.default_folder(digest)
    found, reason = prepared.find(target, digest)
    if found is not None:
        console.notice(f"prepared data found: {target}")
        return found
    if folder and target.exists():
        hint = "remove that folder first, or choose another with --out"
        raise UserError(reason or "the folder exists", str(target), hint)
    if reason:
        console.warning(f"{reason}; preparing it again")
    console.notice(f"preparing {', '.join(sources)}")
    pairs = prepare(sources, data.format, data.on_bad_row, tokenize, target)
    console.notice(f"prepared data written: {target}")
    return pairs


def _check_out(folder: Path) -> UserError | None:
    """Say why pairs cannot be kept in a folder, if so: what is there and is not prepared data stays."""
    from dpo_cli.storage import MANIFEST

    hint = "choose another folder with --out"
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        return UserError(f"`{above}` is a file, not a folder", f"--out {folder}", hint)
    if above == folder and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        return UserError("the folder holds something else", f"--out {folder}", hint)
    return None


@dataclass(frozen=True)
class RunData:
    """The pairs of a run, and which are trained on and which are held out.

    Attributes:
        pairs: All of them.
        train: Indices of the training pairs.
        held_out: Indices of the held-out pairs; empty where there are none.
        fingerprint: A digest of all of it.
    """

    pairs: PreparedPairs
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    fingerprint: str


def run_data(config: Config, tokenize: PairTokenizer, console: Console) -> RunData:
    """Prepare or find the training pairs and the held-out pairs."""
    import numpy as np

    from dpo_cli.storage import text_digest

    assert config.data.train is not None
    pairs = prepared_pairs(config, as_list(config.data.train), tokenize, console)
    digest, held_out = pairs.manifest["fingerprint"], config.data.eval
    if held_out is None:
        return RunData(pairs, np.arange(len(pairs)), np.empty(0, np.int64), digest)
    if isinstance(held_out, float):
        train, held = pairs.hold_out(held_out, config.training.seed)
        if not len(train) or not len(held):
            what = f"holding out {held_out} of {len(pairs)} pairs leaves one side empty"
            hint = "change `data.eval`, name a source of held-out pairs, or set it to null"
            raise UserError(what, "`data.eval`", hint)
        return RunData(pairs, train, held, digest)
    others = prepared_pairs(config, as_list(held_out), tokenize, console)
    both = pairs.followed_by(others)
    indices = np.arange(len(both))
    digest = text_digest(digest, others.manifest["fingerprint"])
    return RunData(both, indices[: len(pairs)], indices[len(pairs) :], digest)


def finite_figures(results: Sequence[PairResult], pairs: PreparedPairs) -> dict[str, Any]:
    """Sum up what was found of held-out pairs.

    Raises:
        UserError: A pair's loss is NaN or infinite; it is named by file and line.
    """
    from dpo_cli.evaluation.statistics import figures

    broken = [result.index for result in results if not math.isfinite(result.metrics["loss"])]
    if broken:
        what = f"the held-out loss is not finite; its pairs: {named_pairs(pairs, broken)}"
        hint = "the weights are damaged, or `training.learning_rate` was too high; the last checkpoint is as it was"
        raise UserError(what, None, hint, status=FAILED)
    return figures(results)


def named_pairs(pairs: PreparedPairs, indices: Sequence[int]) -> str:
    """Name pairs by file and line, the first few of them."""
    origins = [pairs[index].origin for index in indices]
    return ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")


def is_main_process() -> bool:
    """Tell, before Accelerate is imported, whether this process is the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0
