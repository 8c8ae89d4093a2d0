"""What is looked for in the texts of a pair; `TEXT_CHECKS` at the end lists it.

Texts are looked at once, while rows are prepared. Of two possible mistakes, a false alarm is the worse one: each
of the rules misses what it is not sure of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from dpo_cli.data.findings import FlaggedCheck
from dpo_cli.data.pairs.writing_systems import Letters, apart
from dpo_cli.data.records import Message, Pair

_NEAR = 0.1
"""Edits per character of the longer response, up to which two responses are near identical."""

_REPLACEMENT = re.compile("\ufffd")

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\u2060\ufeff]")
"""C0 and C1 but tab and line ends, bidirectional overrides, and invisible marks that no writing system needs."""

_VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufffd]")

_TURN_MARKERS = {
    "\n": ("\n\nHuman:", "\n\nAssistant:"),
    "[": ("[INST]", "[/INST]"),
    "#": ("### Instruction:", "### Response:", "### Human:", "### Assistant:"),
    "<": ("<start_of_turn>", "<end_of_turn>", "<<SYS>>"),
    "|": ("<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>"),
    "｜": ("<｜User｜>", "<｜Assistant｜>"),
}
"""What marks turns in well-known formats, by a character that is found quickly and that most texts do not have."""

_TURN_MARKER = re.compile("|".join(re.escape(marker) for markers in _TURN_MARKERS.values() for marker in markers))

_LEAST_REPEATED = 20
"""Characters of a turn from which on a response that begins with them repeats it, and does not merely quote a word."""

_CANNOT = r"(?:can(?:no|['’])t|won['’]t|am (?:not able|unable) to|['’]m (?:not able|unable) to)"
_HELP = "help|assist|provide|fulfil|comply|create|generate|write|give|offer|support|participate|engage|discuss|answer"
_REFUSALS = (
    # English
    r"(?:(?:i|we)(?:['’]m|['’]re| am| are))?(?: \w+)? ?sorry,? (?:but )?(?:as an ai[^.]{0,40} )?"
    rf"(?:i|we) ?{_CANNOT}\b",
    rf"(?:as an? (?:ai|artificial|large language|language)[^.]{{0,50}} )?i ?{_CANNOT} (?:{_HELP})\b",
    r"i must (?:decline|refuse)\b",
    # German, French, Spanish, Portuguese, Italian, Russian
    r"(?:es tut mir leid|entschuldigung|tut mir leid),? (?:aber )?(?:ich kann|das kann ich|dabei kann ich)",
    r"(?:dabei|damit) kann ich (?:\w+ )?(?:leider )?nicht",
    r"(?:je suis )?désolée?,? (?:mais )?je ne (?:peux|suis)",
    r"lo siento,? (?:pero )?no puedo",
    r"(?:desculpe|sinto muito),? (?:mas )?(?:eu )?não posso",
    r"mi dispiace,? (?:ma )?non posso",
    r"(?:извините|к сожалению),? (?:но )?я не могу",
    # Chinese, Japanese, Korean
    r"(?:很|非常|十分)?(?:抱歉|对不起|遗憾)[,，。 ]*(?:但是?)?(?:我|作为)[^。]{0,20}(?:无法|不能|不会)"
    r"(?:提供|帮|协助|回答|满足|生成|支持)",
    r"申し訳(?:ありません|ございません)が[、,]?[^。]{0,30}(?:できません|できかねます|いたしかねます)",
    r"죄송(?:하지만|합니다)[^.]{0,30}(?:수 없습니다|드릴 수 없)",
)
_REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)
_OPENING = 160
"""Characters of a response among which it shows whether it refuses."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What a pair says.

    Attributes:
        prompt: All of the prompt's turns.
        chosen: The assistant's turns of the chosen answer, with what a tool is called with.
        rejected: Likewise.
        num_turns: The assistant's turns in the answer that has more of them.
        asked: The user's last turn of the prompt.
        letters: The letters of prompt, chosen and rejected; empty where all are ASCII, and so in one writing system.
    """

    prompt: str
    chosen: str
    rejected: str
    num_turns: int
    asked: str
    letters: tuple[Letters, ...]

    @classmethod
    def of(cls, pair: Pair) -> Texts:
        """Read them off a pair."""
        chosen, rejected = _assistants(pair.chosen), _assistants(pair.rejected)
        texts = _said(pair.prompt), _said(chosen), _said(rejected)
        letters = () if all(map(str.isascii, texts)) else tuple(map(Letters.of, texts))
        asked = next((message.text for message in reversed(pair.prompt) if message.role == "user"), "")
        return cls(*texts, max(len(chosen), len(rejected)), asked.strip(), letters)

    @property
    def responses(self) -> tuple[str, str]:
        """Both answers."""
        return self.chosen, self.rejected

    @property
    def parts(self) -> tuple[str, str, str]:
        """Prompt and answers."""
        return self.prompt, self.chosen, self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCheck(FlaggedCheck):
    """Something to look for in the texts of a pair.

    Attributes:
        seen: Whether it is there.
        place: What finds the place in a text, if it is one place.
    """

    seen: Callable[[Texts], bool]
    place: re.Pattern[str] | None = None
    droppable: bool = True


def _assistants(response: Sequence[Message]) -> Sequence[Message]:
    return response if len(response) == 1 else [message for message in response if message.role == "assistant"]


def _said(messages: Sequence[Message]) -> str:
    """Write messages down as one text."""
    return "\n".join(map(_text, messages))


def _text(message: Message) -> str:
    if not message.extras:
        return message.text
    return f"{message.text}\n{json.dumps(message.extras, ensure_ascii=False, default=str)}"


def _control_characters(texts: Texts) -> bool:
    # What is printable but for its line ends has none, and most texts are; the pattern takes five times as long.
    return any(not text.replace("\n", "").isprintable() and _CONTROL.search(text) for text in texts.parts)


def _near_identical(texts: Texts) -> bool:
    most = int(_NEAR * max(map(len, texts.responses)))
    return Levenshtein.distance(*texts.responses, score_cutoff=most) <= most


def _blank(texts: Texts) -> bool:
    return not all(map(_VISIBLE.search, texts.responses))


def _mixed_scripts(texts: Texts) -> bool:
    return bool(texts.letters) and apart(*texts.letters[1:])


def _other_script(texts: Texts) -> bool:
    return bool(texts.letters) and all(apart(texts.letters[0], response) for response in texts.letters[1:])


def _refuses(response: str) -> bool:
    return _REFUSAL.match(response[:_OPENING].lstrip()) is not None


def _refusal_chosen(texts: Texts) -> bool:
    return _refuses(texts.chosen) and not _refuses(texts.rejected)


def _space_at_one_side(texts: Texts) -> bool:
    chosen, rejected = texts.responses
    return any(chosen[end].isspace() != rejected[end].isspace() for end in (slice(1), slice(-1, None)))


def _repeats_prompt(texts: Texts) -> bool:
    if len(texts.asked) < _LEAST_REPEATED:
        return False
    return all(response.lstrip().startswith(texts.asked) for response in texts.responses)


def _turn_markers(texts: Texts) -> bool:
    # Far quicker than the pattern, which is for the place.
    whole = "\0".join(texts.parts)
    return any(sign in whole and any(marker in whole for marker in markers) for sign, markers in _TURN_MARKERS.items())


TEXT_CHECKS = (
    TextCheck(
        "near_identical",
        "warning",
        "the responses hardly differ",
        "The responses differ in a tenth of their characters or less: training on them tends to make both of "
        "them less likely.",
        "Check that the difference is what the model should learn; otherwise drop these pairs.",
        when="at most one edit per ten characters of the longer response turns one response into the other",
        bit=0,
        seen=_near_identical,
    ),
    TextCheck(
        "replacement_characters",
        "warning",
        "a text has U+FFFD, which replaces lost characters",
        "A text has U+FFFD, which replaces lost characters.",
        "Read the original data again with the correct encoding.",
        when="a text contains U+FFFD",
        bit=1,
        seen=lambda texts: any("\ufffd" in text for text in texts.parts),
        place=_REPLACEMENT,
    ),
    TextCheck(
        "control_characters",
        "warning",
        "a text has invisible or control characters",
        "A text has control characters, directional overrides or invisible marks, which the model would learn.",
        "Remove them from the data; characters U+0080 to U+009F are mostly Windows-1252 read as Latin-1.",
        when=(
            "a text contains a character of U+0000–U+001F (except tab and line ends) or U+007F–U+009F, a direction "
            "override (U+202D, U+202E), a word joiner (U+2060) or a byte-order mark (U+FEFF). Joiners and direction"
            " marks that scripts need are accepted"
        ),
        bit=2,
        seen=_control_characters,
        place=_CONTROL,
    ),
    TextCheck(
        "blank_response",
        "warning",
        "a response has no visible character",
        "A response has no visible character.",
        "Leave these pairs out.",
        when="a response has no visible character",
        bit=3,
        seen=_blank,
    ),
    TextCheck(
        "mixed_scripts",
        "warning",
        "the responses are in different writing systems",
        "One response is in another writing system than the other, so that the language alone distinguishes them.",
        "Check that the model should learn to change its language; otherwise drop these pairs.",
        when=(
            "the responses are in two writing systems, each with at most a tenth of its letters in the other's. "
            "Code blocks and texts of fewer than 20 letters are ignored; Chinese and Japanese are treated as one"
        ),
        heuristic=True,
        bit=4,
        seen=_mixed_scripts,
    ),
    TextCheck(
        "other_script",
        "info",
        "both responses are in another writing system than the prompt",
        "Both responses are in another writing system than the prompt: right for translations, else probably wrong.",
        "Look at a few.",
        when="both responses are in another writing system than the prompt, in the same sense",
        heuristic=True,
        bit=5,
        seen=_other_script,
    ),
    TextCheck(
        "refusal_chosen",
        "info",
        "the chosen response begins like a refusal",
        "The chosen response begins like a refusal and the rejected one does not: meant so in data on safety, "
        "elsewhere a label on the wrong side.",
        "Look at a few.",
        when=(
            "the chosen response begins like a refusal (“I'm sorry, but I can't …” and the like in English, German,"
            " French, Spanish, Portuguese, Italian, Russian, Chinese, Japanese and Korean), the rejected one does "
            "not"
        ),
        heuristic=True,
        bit=6,
        seen=_refusal_chosen,
    ),
    TextCheck(
        "space_at_one_side",
        "info",
        "only one response begins or ends with white space",
        "One response begins or ends with white space and the other does not, which gives it away where the "
        "template keeps it.",
        "Strip the responses.",
        when="one response begins or ends with white space and the other does not",
        bit=7,
        seen=_space_at_one_side,
    ),
    TextCheck(
        "multi_turn",
        "info",
        "a response has several turns of the assistant",
        "A response has more than one turn of the assistant: the two conversations diverge before the last turn.",
        "Set `data.turns` to `all` or `last`, depending on what the model should learn.",
        when="a response has several turns of the assistant: the conversations diverge before their last turn",
        bit=8,
        seen=lambda texts: texts.num_turns > 1,
    ),
    TextCheck(
        "repeats_prompt",
        "warning",
        "both responses begin with the user's last turn",
        "Both responses begin with the user's last turn: the model would learn to repeat the question.",
        "Remove the prompt from the responses.",
        when="both responses begin with the user's last turn, of 20 characters at least",
        bit=9,
        seen=_repeats_prompt,
    ),
    TextCheck(
        "turn_markers",
        "warning",
        "a text has turn markers of another format",
        "A text holds what marks turns in another format: the data is perhaps of another shape, or was written "
        "out by a template before.",
        "Look at some examples; split such texts into messages, or set their shape in `data.format`.",
        when=(
            "a text contains turn markers of another format: `Human:` or `Assistant:` after an empty line, "
            "`[INST]`, `### Instruction:`, `### Response:`, `<|user|>`, `<|im_start|>`, `<start_of_turn>` "
            "and the like"
        ),
        heuristic=True,
        bit=10,
        seen=_turn_markers,
        place=_TURN_MARKER,
    ),
)
"""All that is looked for."""


def text_flags(pair: Pair) -> int:
    """Return what is found in the texts of a pair, as the bits of `TEXT_CHECKS`."""
    texts = Texts.of(pair)
    return sum([check.flag for check in TEXT_CHECKS if check.seen(texts)])
