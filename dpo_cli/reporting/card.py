"""The model card of a trained or exported model, as the Hub reads it: README.md of its folder.

It says where the model comes from, how it was trained and checked, with figures and their intervals, how it is loaded,
and what is not known of it. Names of models, data and folders are text in it, neither Markdown nor HTML; they contain
no secret, and of a path only its last part, since a card is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_cli import __version__
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.evaluation.statistics import Estimate
from dpo_cli.modeling.folders.provenance import Provenance
from dpo_cli.reporting.safe_text import as_markdown, markdown_code, markdown_fence, visible
from dpo_cli.reporting.secrets import covered
from dpo_cli.reporting.tables import HELD_OUT
from dpo_cli.system import plain_yaml
from dpo_cli.system.hub import public_name

FOLDER = "path/to/this/folder"
"""What the commands of a card call the folder that it is in; once that is published, its id does as well."""

_ACCURACY = "rewards/accuracies"
_QUESTION = "Why is the sky blue?"

_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}{how})
tokenizer = AutoTokenizer.from_pretrained({folder}{how})
"""
_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained({base}{how})
base.generation_config = GenerationConfig.from_pretrained({folder})
model = PeftModel.from_pretrained(base, {folder})
tokenizer = AutoTokenizer.from_pretrained({folder}{how})
"""
_CHAT = """
messages = [{{"role": "user", "content": {question}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{named})
"""
_TEXT = """
prompt = {question}
"""
_ANSWER = """inputs = tokenizer(prompt, return_tensors="pt"{special})
answer = model.generate(
    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=256
)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
_OTHERS = """llama-cli -m {file}          # llama.cpp
ollama create {name} -f Modelfile && ollama run {name}
"""


@dataclass(frozen=True)
class Card:
    """What a model card is written from.

    Attributes:
        name: What the model is called.
        form: What its folder holds.
        settings: What it was trained by, in full; empty for a model that this program did not train.
        provenance: Where the model that it was made from comes from.
        base: How that is named.
        facts: What else is known of how it was trained and written.
        datasets: The ids of data sets on the Hub that it was trained on.
        columns: Figures of the scored pairs, by the model or the time of their measurement; empty: there are none.
        changes: From before training to after it, by figure: the difference and its interval.
        scored: What the pairs of the figures are called.
        checked: How what was written was proved, by what was compared.
        chats: Whether the tokenizer has a chat template.
        template: Of several, the name of the one that it was trained with; empty: that one is taken without a name.
        gguf: The name of the GGUF file.
    """

    name: str
    form: str = "model"
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    base: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changes: Mapping[str, Estimate] = field(default_factory=dict)
    scored: str = HELD_OUT
    checked: Mapping[str, str] = field(default_factory=dict)
    chats: bool = True
    template: str = ""
    gguf: str = ""

    @property
    def trained(self) -> bool:
        """Whether this program has trained it."""
        return bool(self.settings)

    @property
    def whole(self) -> bool:
        """Whether the folder holds a whole model."""
        return self.form != ADAPTER


MODEL, ADAPTER, MERGED, GGUF = "model", "adapter", "merged", "gguf"
"""What a folder holds: a model, an adapter, a model of adapter and base, or a GGUF file."""

_LIBRARIES = {MODEL: "transformers", ADAPTER: "peft", MERGED: "transformers", GGUF: "gguf"}


def model_card(card: Card) -> str:
    """Write the card."""
    sections = [
        f"---\n{yaml.safe_dump(_front(card), sort_keys=False, allow_unicode=True)}---",
        f"# {as_markdown(card.name)}",
        _introduction(card),
        "## Use",
        *_use(card),
        *(["## Training", _table(_facts(card))] if card.trained or card.facts else []),
        *_figures(card),
        *(["## Checked", _CHECKED, _table({name: [text] for name, text in card.checked.items()})] * bool(card.checked)),
        "## Intended use",
        "*To be filled in by whoever publishes the model: what it is for, for whom, and what it is not for.*",
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(card)),
        "*To be completed: languages, subjects and risks that were looked at, and what was found.*",
        "## Licence",
        _licence(card),
        *(_settings(card) if card.trained else []),
    ]
    return "\n\n".join(sections) + "\n"


_CHECKED = "What was written was read again, and compared with the model that it was made from, in float32:"


def _front(card: Card) -> dict[str, Any]:
    """Return the fields that the Hub reads."""
    nearest = [covered(one) for one in card.provenance.nearest]
    adapted = card.settings.get("adapter") is not None or card.form == ADAPTER
    tags = [
        *(["dpo", "preference-optimization"] if card.trained else []),
        *["lora"] * adapted,
        *["gguf"] * bool(card.gguf),
    ]
    relation = "adapter" if card.form == ADAPTER else "finetune" if card.trained else "quantized" if card.gguf else ""
    licence = card.provenance.licence
    return {
        "library_name": _LIBRARIES[card.form],
        "pipeline_tag": "text-generation",
        **({"base_model": nearest[0] if len(nearest) == 1 else nearest} if nearest else {}),
        **({"base_model_relation": relation} if nearest and relation else {}),
        **(licence.fields if licence else {}),
        **({"datasets": [covered(one) for one in card.datasets]} if card.datasets else {}),
        "tags": tags,
        **_results(card),
    }


def _results(card: Card) -> dict[str, Any]:
    """Return the reward accuracy of the last model of the table, as the Hub's list of results has it."""
    figures = list(card.columns.values())[-1:]
    if not figures or _ACCURACY not in figures[0]:
        return {}
    found, name = figures[0], visible(covered(card.name))
    metrics = [{"type": "accuracy", "name": "reward accuracy", "value": round(found[_ACCURACY], 4)}]
    if interval := found.get("accuracy_interval"):
        metrics[0]["args"] = {"interval_95": [round(end, 4) for end in interval]}
    data = {"type": card.datasets[0] if len(card.datasets) == 1 else "preference-pairs", "name": card.scored}
    task = {"type": "text-generation", "name": "preferring the chosen response"}
    return {"model-index": [{"name": name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]}


def _introduction(card: Card) -> str:
    """Say in a few sentences what the folder holds."""
    base = _named_base(card)
    holds = {
        MODEL: "a whole model",
        ADAPTER: "an adapter, not a whole model: it changes what its base answers",
        MERGED: "a whole model, of which the adapter that was trained is part",
        GGUF: f"a whole model in one file, {markdown_code(visible(card.gguf))}, for llama.cpp and programs built on it",
    }[card.form]
    made = f"Fine-tuned from {base} on preference pairs" if card.trained else f"Made from {base}"
    start = (card.settings.get("adapter") or {}).get("start")
    went_on = (
        f" Training went on from the adapter {markdown_code(visible(covered(public_name(start))))}." if start else ""
    )
    return f"{made} by dpo {__version__}. This folder holds {holds}.{went_on}"


def _named_base(card: Card) -> str:
    """Name the base, with the models that it was made from itself, where these are known."""
    named = _shown(card.provenance.hub_id or public_name(card.base))
    origins = [_shown(one) for one in card.provenance.bases if one != card.base]
    return f"{named} (made from {', '.join(origins)})" if origins else named


def _shown(name: str) -> str:
    return markdown_code(visible(covered(name)))


def _use(card: Card) -> Iterator[str]:
    """Yield how the model is loaded and asked."""
    how = ", trust_remote_code=True" if (card.settings.get("model") or {}).get("trust_remote_code") else ""
    folder = _literal(FOLDER)
    if card.gguf:
        yield _fenced("sh", _OTHERS.format(file=_shell(card.gguf), name=_ollama_name(card.name)))
        yield (
            "transformers dequantizes it; of some architectures and tokenizers it does not read such files, or not as "
            "llama.cpp does:"
        )
        how = f", gguf_file={_literal(card.gguf)}"
    if card.form == ADAPTER:
        loads = _ADAPTER.format(base=_base_argument(card), folder=folder, how=how)
    else:
        loads = _MODEL.format(folder=folder, how=how)
    if card.chats:
        named = f", chat_template={_literal(card.template)}" if card.template else ""
        asks = _CHAT.format(question=_literal(_QUESTION), named=named) + _ANSWER.format(
            special=", add_special_tokens=False"
        )
    else:
        plain = f"### Instruction:\n{_QUESTION}\n\n### Response:\n"
        asks = _TEXT.format(question=_literal(plain)) + _ANSWER.format(special="")
    yield _fenced("python", loads + asks)
    if card.form == ADAPTER:
        yield (
            "`model.merge_and_unload()` makes one model of both. `dpo export RUN --to FOLDER --merge` writes such a "
            "model, and compares its log-probabilities with the adapter's."
        )


def _base_argument(card: Card) -> str:
    """Return the arguments that `from_pretrained` takes for the base: its id, or where it should be."""
    if card.provenance.hub_id:
        return _literal(covered(card.provenance.hub_id))
    name = Path(covered(card.base)).name
    if name.lower().endswith(".gguf"):
        return f'"path/to/its/folder", gguf_file={_literal(name)}'
    return _literal(f"path/to/{name}")


def _literal(text: str) -> str:
    """Write a text as a Python literal in which nothing is invisible."""
    return json.dumps(visible(text) if "\n" not in text else text, ensure_ascii=False)


def _shell(name: str) -> str:
    """Write a file's name as a word of a shell."""
    text = visible(covered(name))
    return text if re.fullmatch(r"[\w.+-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _ollama_name(name: str) -> str:
    """Return a name that Ollama takes."""
    return re.sub(r"[^a-z0-9._-]+", "-", covered(name).lower()).strip("-._") or "my-model"


def _facts(card: Card) -> dict[str, list[Any]]:
    """Return what is known of the training, the base first."""
    provenance = card.provenance
    base = {
        "base": provenance.hub_id or public_name(card.base),
        **({"revision of the base": provenance.revision} if provenance.revision else {}),
    }
    return {name: [fact] for name, fact in {**base, **card.facts}.items()}


def _figures(card: Card) -> list[str]:
    """Write the table of figures, with intervals."""
    if not card.columns:
        return ["## Held-out figures", "None: no held-out pairs were scored."] if card.trained else []
    title = "Held-out figures" if card.scored == HELD_OUT else f"Figures of {card.scored}"
    shown = {}
    for figure in FIGURES:
        cells = [figure.cell(figures) for figures in card.columns.values()]
        shown[figure.title.strip()] = [*cells, *([_change(card.changes.get(figure.key))] if card.changes else [])]
    columns = [*card.columns, *(["change by training (95 % interval)"] if card.changes else [])]
    return [f"## {title}", _table(shown, columns)]


def _change(found: Estimate | None) -> str:
    """Write the difference of a figure and its interval; nothing for a figure that has none."""
    if found is None:
        return ""
    interval = "" if found.interval is None else " ({:+.4f} to {:+.4f})".format(*found.interval)
    return f"{found.value:+.4f}{interval}"


def _limits(card: Card) -> Iterator[str]:
    """Yield what is known of what the model can and cannot do."""
    if card.trained:
        pairs = re.match(r"[\d,]+ (?=to train on)", str(card.facts.get("pairs", "")))
        yield (
            f"It was trained on {pairs[0] if pairs else ''}preference pairs: to prefer the chosen to the rejected "
            "responses of that data, with whatever is wrong or one-sided in them."
        )
        yield (
            f"The figures say how often it ranks {card.scored} as their data does. They do not say whether its answers "
            "are true, helpful or harmless, nor how it does on other data."
            if card.columns
            else "It was not evaluated on held-out pairs."
        )
    yield "It was not evaluated for safety, bias or truthfulness; what its base does wrong it may do as well."


def _licence(card: Card) -> str:
    """Say what licence the base has, where that is known."""
    licence = card.provenance.licence
    if licence is None:
        return (
            "The licence of the base is not known here, so this card names none. Look it up before you publish the "
            "model, and add it above as `license`."
        )
    at = f" ({_shown(licence.link)})" if licence.link else ""
    named = f"{_shown(licence.name or licence.id)}{at}"
    return (
        f"The base is under {named}, as its own files say. What that asks of models made from it applies to this one "
        "too."
    )


def _settings(card: Card) -> list[str]:
    """Write all settings as YAML, without secrets."""
    text = covered(plain_yaml.dump(covered_within(card.settings)))
    return ["## Settings", _fenced("yaml", text)]


def _fenced(language: str, text: str) -> str:
    fence = markdown_fence(text, 3)
    return f"{fence}{language}\n{text}{fence}"


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
