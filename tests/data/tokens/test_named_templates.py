"""Several chat templates of one tokenizer, and templates that ask for the date."""

from __future__ import annotations

import copy
import dataclasses
from datetime import date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.chat_template import with_day
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from dpo_cli.errors import UserError
from tests.data.chat_templates import TEMPLATES
from tests.data.more_templates import TOOL_TEMPLATES
from tests.data.tiny_tokenizers import as_dicts, tokenizer_of

TOOL = {"type": "function", "function": {"name": "add", "description": "Add numbers.", "parameters": {}}}
PAIR = Pair((Message("user", "Add."),), (Message("assistant", "Four."),), (Message("assistant", "No."),), "f:1")
WITH_TOOLS = dataclasses.replace(PAIR, arguments={"tools": [TOOL]})
TEXTS = {
    "default": TEMPLATES["ChatML"].text.strip(),
    "tool_use": TOOL_TEMPLATES["Qwen 2.5"].strip(),
    "rag": TEMPLATES["ChatML"].text.strip() + "{# Another. #}",
}


def tokenizer_with(*names: str):
    tokenizer = copy.deepcopy(tokenizer_of("Qwen 3"))
    tokenizer.chat_template = {name: TEXTS[name] for name in names}
    return tokenizer


def tokenizing(tokenizer, **settings) -> PairTokenizer:
    return PairTokenizer(tokenizer, **{"template": None, "max_length": 1000, "on_too_long": "error", **settings})


@pytest.mark.parametrize("names", [("default", "tool_use"), ("rag", "default"), ("rag", "tool_use", "default")])
def test_a_template_is_chosen_as_transformers_chooses(names):
    tokenizer = tokenizer_with(*names)
    pairs = [PAIR, WITH_TOOLS, PAIR]
    for pair, found in zip(pairs, tokenizing(tokenizer)(pairs), strict=True):
        assert isinstance(found, Tokenized)
        own = tokenizer.apply_chat_template(
            as_dicts(pair.prompt + pair.chosen), tokenize=True, return_dict=False, **pair.arguments
        )
        assert [*found.pair.prompt, *found.pair.chosen] == own
        has_tools = pair is WITH_TOOLS and "tool_use" in names
        assert found.unwritten == (frozenset() if pair is PAIR or has_tools else {"tools_unwritten"})


def test_a_pair_for_which_there_is_no_template_is_refused_alone():
    refused, kept = tokenizing(tokenizer_with("tool_use", "rag"))([PAIR, WITH_TOOLS])
    assert isinstance(refused, BadRow)
    assert "`tool_use`, `rag`" in refused.detail
    assert isinstance(kept, Tokenized)


def test_any_template_of_several_is_part_of_what_the_prepared_data_was_made_with():
    sets = [("default",), ("default", "tool_use"), ("default", "rag"), ("default", "tool_use", "rag")]
    assert len({tokenizing(tokenizer_with(*names)).settings["chat template"] for names in sets}) == len(sets)
    alone = tokenizing(tokenizer_of("Qwen 3"), template=TEXTS["default"]).settings
    assert tokenizing(tokenizer_with("default")).settings["chat template"] == alone["chat template"]


def test_none_at_all_is_an_error():
    tokenizer = tokenizer_with()
    with pytest.raises(UserError, match="no chat template"):
        tokenizing(tokenizer)


DATED = "{{ strftime_now(FORMAT) }}" + TEXTS["default"]
FORMATS = ("%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y (day %j)", "100%% on %y/%m/%d", "%H:%M", "%c", "no date")


@settings(max_examples=15, deadline=None)
@given(day=st.dates(date(1970, 1, 1), date(2200, 1, 1)), asked=st.sampled_from(FORMATS))
def test_a_template_that_asks_for_the_date_is_told_its_day(day, asked):
    """As the function that it calls would tell it, on that day; the rest of the template is as it was."""
    call, told = "{{ strftime_now(" + repr(asked) + ") }}", datetime.combine(day, datetime.min.time()).strftime(asked)
    is_told = "{%- if strftime_now is defined %}"
    for text in (call, f"\n{call}\n", f"  {is_told}\n{call}{{% endif %}}\n x", f"{{# #}}\n{call}"):
        stated = text.replace(call, told).replace(is_told, "{%- if 1 %}")
        assert rendered(with_day(text, day)) == rendered(stated)


def rendered(text: str) -> str:
    return str(_compile_jinja_template(text).render(messages=[]))


def test_the_day_counts_where_the_template_asks_for_it_and_nowhere_else():
    first, second = date(2024, 2, 29), date(2024, 3, 1)
    dated = DATED.replace("FORMAT", "'%d %b %Y'")
    both = [tokenizing(tokenizer_of("Qwen 3"), template=dated, day=day) for day in (first, second)]
    assert both[0].settings != both[1].settings
    shown = [tokenizer_of("Qwen 3").decode(one([PAIR])[0].pair.prompt) for one in both]
    assert shown[0].startswith("29 Feb 2024<|im_start|>")
    assert shown[1].startswith("01 Mar 2024<|im_start|>")
    without = [tokenizing(tokenizer_of("Qwen 3"), template=TEXTS["default"], day=day) for day in (first, second, None)]
    assert without[0].settings == without[1].settings == without[2].settings
