"""A `Modelfile` for Ollama: the GGUF file, how conversations are written, where answers end and how they are sampled.

Ollama writes conversations by templates of Go, models come with those of Jinja. What a model's template puts before,
between and behind messages is found out from what it writes; a Go template is made of that, and left out unless both
write the same conversations.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dpo_cli.data.records import Message
from dpo_cli.data.tokens.chat_template import DEFAULT, asks_for_the_day, named_templates
from dpo_cli.modeling.gguf.conversations import conversations, turns, written
from dpo_cli.modeling.gguf.vocabulary import starts_with_bos

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_QUESTIONS, _ANSWERS, _SYSTEM = (
    ("dpoQuestionA", "dpoQuestionB", "dpoQuestionC"),
    ("dpoAnswerA", "dpoAnswerB"),
    "dpoSystem",
)
_LAST = "eq (len (slice $.Messages $i)) 1"
_SAMPLING: dict[str, tuple[str, float | None]] = {
    "temperature": ("temperature", 1), "top_k": ("top_k", 50), "top_p": ("top_p", 1), "min_p": ("min_p", None),
    "repetition_penalty": ("repeat_penalty", 1),
}  # fmt: skip
"""Settings of generation, what Ollama calls them, and what transformers takes where nothing is set."""


@dataclass(frozen=True)
class ChatForm:
    """What is written around the messages of a conversation.

    Attributes:
        start: Before the first question, where there is no system message.
        before_system: Before the system message; with `system_last`, behind what comes before a question anyway.
        after_system: Between the system message and the question.
        answer: Between a question and its answer.
        ask: Behind the last question.
        next: Between an answer and the next question.
        system_last: Whether the system message comes before the last question, rather than before the first.
        takes_system: Whether the model's template takes system messages at all.
    """

    start: str
    before_system: str
    after_system: str
    answer: str
    ask: str
    next: str
    system_last: bool = False
    takes_system: bool = True

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
        """Return the form of a tokenizer's chat template; `None`: there is none, or it does more than this can say."""
        template = named_templates(tokenizer).get(DEFAULT)
        if template is None or asks_for_the_day(template):
            return None
        form = _found(tokenizer)
        systems = (False, True) if form is not None and form.takes_system else (False,)
        for messages in (messages for system in systems for messages in conversations(system)):
            if form is None or form.write(messages) != written(tokenizer, messages):
                return None
        return form

    def write(self, messages: Sequence[Message]) -> str:
        """Write a conversation that ends with a question, and begin the answer."""
        system = next((message.content for message in messages if message.role == "system"), "")
        rest = [message for message in messages if message.role != "system"]
        said = f"{self.before_system}{system}{self.after_system}" if system else ""
        text = said if said and not self.system_last else self.start
        for place, message in enumerate(rest):
            last = place == len(rest) - 1
            if message.role == "user":
                text += said if self.system_last and last else ""
                text += message.content + (self.ask if last else self.answer)
            else:
                text += message.content + ("" if last else self.next)
        return text

    def without(self, bos: str) -> ChatForm:
        """Return the form where a reader puts a token before every text that this one writes there itself."""
        before = self.before_system if self.system_last else self.before_system.removeprefix(bos)
        return replace(self, start=self.start.removeprefix(bos), before_system=before)

    def in_go(self) -> str:
        """Return a Go template that writes such conversations, as Ollama applies it."""
        said = f"{_verbatim(self.before_system)}{{{{ $.System }}}}{_verbatim(self.after_system)}"
        start = _verbatim(self.start)
        at_last = ""
        if self.system_last:
            at_last = f"{{{{ if $.System }}}}{{{{ if {_LAST} }}}}{said}{{{{ end }}}}{{{{ end }}}}"
        else:
            start = f"{{{{ if $.System }}}}{said}{{{{ else }}}}{start}{{{{ end }}}}"
        behind = _verbatim(self.ask)
        if self.ask != self.answer:
            behind = f"{{{{ if {_LAST} }}}}{behind}{{{{ else }}}}{_verbatim(self.answer)}{{{{ end }}}}"
        return (
            f"{start}{{{{ range $i, $m := .Messages }}}}"
            f'{{{{ if eq $m.Role "user" }}}}{at_last}{{{{ $m.Content }}}}{behind}'
            f'{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}'
            f"{{{{ if {_LAST} }}}}{{{{ else }}}}{_verbatim(self.next)}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def modelfile(
    gguf_name: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: Collection[int] = (),
    generation: GenerationConfig | None = None,
) -> str:
    """Return the `Modelfile` for a GGUF file beside it.

    Args:
        gguf_name: The file's name.
        tokenizer: The model's tokenizer with its chat template.
        stops: The tokens that end an answer.
        generation: How answers are sampled; `None`: nothing is said of that.
    """
    lines = [f"FROM ./{gguf_name}", *_template(tokenizer)]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stop_texts(tokenizer, stops)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items()]
    return "\n".join(lines) + "\n"


def _template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the lines that say how conversations are written, or why none do."""
    if not named_templates(tokenizer):
        return ["# The model has no chat template: prompts are taken as they are.", 'TEMPLATE "{{ .Prompt }}"']
    form = ChatForm.of(tokenizer)
    if form is None:
        return [
            "# No TEMPLATE: the model's chat template does more than put texts around messages.",
            "# Ollama reads the one in the GGUF file, as far as it knows it.",
        ]
    if starts_with_bos(tokenizer):
        form = form.without(str(tokenizer.bos_token))
    why = []
    if not form.takes_system:
        why = ["# The model's chat template takes no system message: one is put before the first question."]
    return [*why, f'TEMPLATE """{form.in_go()}"""']


def _found(tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
    """Return what a template writes around the messages of one conversation, with and without a system message."""
    plain = turns(_QUESTIONS, _ANSWERS)
    marks = [message.content for message in plain]
    parts = _between(written(tokenizer, plain), marks)
    if parts is None:
        return None
    start, answer, following, _, _, ask = parts
    form = ChatForm(start, start, "\n\n", answer, ask, following, takes_system=False)
    told = written(tokenizer, [Message("system", _SYSTEM), *plain])
    if told is None or _SYSTEM not in told:
        return form
    first = _between(told, [_SYSTEM, *marks])
    if first is not None:
        return replace(form, before_system=first[0], after_system=first[1], takes_system=True)
    last = _between(told, [*marks[:-1], _SYSTEM, marks[-1]])
    if last is None or not last[4].startswith(following):
        return None
    before = last[4].removeprefix(following)
    return replace(form, before_system=before, after_system=last[5], system_last=True, takes_system=True)


def _between(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """Return what is before, between and behind marks that a text has once each, in their order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _verbatim(text: str) -> str:
    """Return text as a Go template writes it, within the three quotes of a `Modelfile`."""
    for odd in ("{{", '"""', "\r"):
        text = text.replace(odd, f"\ufdd0{odd}\ufdd1")
    return _in_actions(text)


def _in_actions(text: str) -> str:
    """Return a text with what is between two marks made a string that an action writes."""
    before, found, rest = text.partition("\ufdd0")
    if not found:
        return text
    odd, _, rest = rest.partition("\ufdd1")
    return f"{before}{{{{ {json.dumps(odd)} }}}}{_in_actions(rest)}"


def _quoted(text: str) -> str:
    """Return a text as a `Modelfile` has it: between quotes, in which nothing is escaped."""
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _stop_texts(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> list[str]:
    """Return the tokens that end an answer as texts, the eos token first."""
    eos = tokenizer.eos_token_id
    ordered = sorted(stops or ([] if eos is None else [eos]), key=lambda stop: (stop != eos, stop))
    return [text for text in (str(tokenizer.decode([stop])) for stop in ordered) if text]


def _sampling(generation: GenerationConfig | None) -> dict[str, float]:
    """Return how answers are sampled, as Ollama calls it; a model that does not sample takes the likeliest token."""
    if generation is None:
        return {}
    found = {theirs: (getattr(generation, ours, None), usual) for ours, (theirs, usual) in _SAMPLING.items()}
    known = {name: usual if value is None else value for name, (value, usual) in found.items()}
    if not generation.do_sample:
        known = {"temperature": 0, "repeat_penalty": known["repeat_penalty"]}
    return {name: float(value) for name, value in known.items() if value is not None}
