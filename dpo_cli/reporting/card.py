"""The model card of a trained model: what it was trained from, how, and its held-out figures.

Names of models, data and folders are text in it, neither Markdown nor HTML, and contain no secret.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_cli import __version__
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.reporting.safe_text import as_markdown, markdown_code, markdown_fence, visible
from dpo_cli.reporting.secrets import covered
from dpo_cli.reporting.tables import HELD_OUT
from dpo_cli.system import plain_yaml

_LOADED = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""


def model_card(
    name: str,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, Any]],
    *,
    merged: bool = False,
    scored: str = HELD_OUT,
) -> str:
    """Write the card.

    Args:
        name: The run's name.
        settings: The configuration as resolved.
        facts: Numbers of pairs and steps, library versions.
        columns: The held-out figures by the time of their measurement; empty without held-out pairs.
        merged: Whether an adapter that was trained is part of the base now.
        scored: What the pairs of the figures are called.
    """
    base = settings["model"]["name"]
    adapted = settings.get("adapter") is not None
    library = "peft" if adapted and not merged else "transformers"
    front: dict[str, Any] = {"library_name": library, "tags": ["dpo", "preference-optimization", *["lora"] * adapted]}
    if not Path(base).exists():
        front["base_model"] = covered(base)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {as_markdown(name)}",
        f"Fine-tuned from {markdown_code(visible(covered(base)))} on preference pairs by dpo {__version__}.",
        *(_use(base, settings["adapter"]) if adapted and not merged else []),
        "## Data and steps",
        _table({name: [fact] for name, fact in facts.items()}),
    ]
    if columns:
        shown = {figure.title.strip(): [figure.cell(figures) for figures in columns.values()] for figure in FIGURES}
        title = "Held-out figures" if scored == HELD_OUT else f"Figures of {scored}"
        sections += [f"## {title}", _table(shown, list(columns))]
    else:
        sections += ["## Held-out figures", "None: no held-out pairs were scored."]
    settings_text = covered(plain_yaml.dump(covered_within(settings)))
    fence = markdown_fence(settings_text, 3)
    sections += ["## Settings", f"{fence}yaml\n{settings_text}{fence}"]
    return "\n\n".join(sections) + "\n"


def _use(base: str, adapter: Mapping[str, Any]) -> list[str]:
    """Say that this is an adapter, of which base, and how both are loaded and merged."""
    start = adapter.get("start")
    went_on = f" Training went on from the adapter {markdown_code(visible(covered(start)))}." if start else ""
    named, within = json.dumps(visible(covered(base)), ensure_ascii=False), ""
    if Path(base).suffix.lower() == ".gguf":
        folder, within = str(Path(base).parent), f", gguf_file={json.dumps(Path(base).name, ensure_ascii=False)}"
        named = json.dumps(visible(covered(folder)), ensure_ascii=False)
    code = _LOADED.format(base=f"{named}{within}")
    fence = markdown_fence(code, 3)
    return [
        f"This folder holds an adapter, not a whole model: it changes what its base answers.{went_on}",
        "## Use",
        f"{fence}python\n{code}{fence}",
        "`model.merge_and_unload()` makes one model of both. `dpo export RUN --to FOLDER --merge` writes such a model, "
        "and compares its log-probabilities with the adapter's.",
    ]


def covered_within(value: Any) -> Any:
    """Mask the secrets in all texts of a value, before YAML quotes or folds them."""
    if isinstance(value, Mapping):
        return {name: covered_within(item) for name, item in value.items()}
    if isinstance(value, list):
        return [covered_within(item) for item in value]
    return covered(value) if isinstance(value, str) else value


def _table(rows: Mapping[str, Sequence[Any]], columns: Sequence[str] = ("",)) -> str:
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(as_markdown(cell).replace("|", "\\|") for cell in cells)] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
