"""Templates that only write what is said: which they are, and that filling their forms is what applying them does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.records import Message
from dpo_cli.data.tokens.chat_template import ChatTemplate, template_errors
from dpo_cli.data.tokens.forms import only_writes
from tests.data.awkward_texts import texts
from tests.data.chat_templates import TEMPLATES

WRITES = {"ChatML", "Llama 3", "Gemma", "Phi-3", "Zephyr", "no generation prompt", "OpenChat", "Harmony"}

ONLY_WRITE = {
    "twice": "{% for m in messages %}{{ m.content }}{{ m['content'] }}{% endfor %}",
    "joined": "{% for m in messages %}{{ m.role ~ m.content ~ 1 }}{% endfor %}",
    "stripped, not stripped": "{% for m in messages %}{{ m.content|trim + m.content + m.content.strip() }}{% endfor %}",
    "one of two": "{% for m in messages %}{{ m.content if m.role == 'user' else m.content|trim }}{% endfor %}",
    "none of two": "{% for m in messages %}[{{ m.content if m.role == 'user' }}]{% endfor %}",
    "a name": "{% for m in messages %}{% set x = '<' + m.content %}{{ x + '>' }}{% endfor %}",
    "a name of a part": "{% set x = messages[1:] %}{% for m in x %}{{ m.content }}{% endfor %}{{ x|length }}",
    "one of two parts": "{% for m in (messages[1:] if bos_token else messages) %}{{ m.content }}{% endfor %}",
    "the last ones": "{{ messages[-1].content }}{{ messages[messages|length - 1].role }}",
    "a name that lives for a round": (
        "{% set x = '' %}{% for m in messages %}{{ x }}{% set x = m.content %}{{ x }}{% endfor %}{{ x }}"
    ),
    "a loop in a loop": (
        "{% for m in messages if m.role == 'user' %}{% for n in messages %}{{ loop.index ~ n.content }}{% endfor %}"
        "{{ loop.last }}{% else %}nobody{% endfor %}"
    ),
    "percent signs": "100 % {% for m in messages %}%s{{ '%d' }}{{ m.content }}%{% endfor %}",
    "an error": "{% for m in messages %}{{ m.content + m.nothing.at.all }}{% endfor %}",
    "white space of a form": "{{ '%c' % 8195 }}{{ messages[0].content|trim }}{{ '%c' % 8195 }}",
    "the marks of a form": "{{ '%c%d%c' % (64978, 0, 64978) }}{{ messages[0].content }}",
    "a mark without a message": "{{ '\\ufdd29\\ufdd2' }}{{ messages[0].content }}",
    "a number of more digits than are written": "{% set x = 0x" + "f" * 5000 + " %}{{ messages[0].content }}",
    "an error by role": (
        "{% for m in messages %}{% if loop.index == 3 %}{{ raise_exception('no: ' + m.role) }}{% endif %}{% endfor %}"
    ),
}

LOOK = {
    "a condition": "{% for m in messages %}{% if m.content %}x{% endif %}{% endfor %}",
    "a comparison": "{% for m in messages %}{{ m.content == 'a' }}{% endfor %}",
    "what holds it": "{% for m in messages %}{{ 'a' in m.content }}{% endfor %}",
    "what it is held by": "{% for m in messages %}{{ m.content in 'user' }}{% endfor %}",
    "a test": "{% for m in messages %}{{ m.content is lower }}{% endfor %}",
    "a condition in brackets": "{% for m in messages %}{{ 'x' if m.content else 'y' }}{% endfor %}",
    "and": "{% for m in messages %}{{ m.content and 'x' }}{% endfor %}",
    "its length": "{% for m in messages %}{{ m.content|length }}{% endfor %}",
    "capitals": "{% for m in messages %}{{ m.content|upper }}{% endfor %}",
    "JSON": "{% for m in messages %}{{ m.content|tojson }}{% endfor %}",
    "all as JSON": "{{ messages|tojson }}",
    "a message as it is": "{% for m in messages %}{{ m }}{% endfor %}",
    "all as they are": "{{ messages }}",
    "a letter": "{% for m in messages %}{{ m.content[0] }}{% endfor %}",
    "some letters": "{% for m in messages %}{{ m.content[1:] }}{% endfor %}",
    "every letter": "{% for m in messages %}{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "a replacement": "{% for m in messages %}{{ m.content.replace('a', 'b') }}{% endfor %}",
    "a part": "{% for m in messages %}{{ m.content.split(':')[-1] }}{% endfor %}",
    "stripped at one end": "{% for m in messages %}{{ m.content.rstrip() }}{% endfor %}",
    "other letters stripped": "{% for m in messages %}{{ m.content|trim('x') }}{% endfor %}",
    "more than it stripped": "{% for m in messages %}{{ (m.content + ' ')|trim }}{% endfor %}",
    "a name stripped": "{% for m in messages %}{% set x = m.content %}{{ x|trim }}{% endfor %}",
    "a name looked at": "{% set x = messages[0].content %}{% if x %}{{ x }}{% endif %}",
    "a name that may be it": "{% set x = '' %}{% if a %}{% set x = messages[0].content %}{% endif %}{{ x|length }}",
    "a name of a message": "{% set x = messages[0] %}{{ x|length }}",
    "a function": "{% for m in messages %}{{ m.get('content')|length }}{% endfor %}",
    "its values": "{% for m in messages %}{% for v in m.values() %}{{ v|length }}{% endfor %}{% endfor %}",
    "a key that is worked out": "{% for m in messages %}{{ m['con' ~ 'tent']|length }}{% endfor %}",
    "a neighbour": "{% for m in messages %}{{ (loop.previtem or m).content|length }}{% endfor %}",
    "a change": "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "selecting": "{% for m in messages|selectattr('content', 'lower') %}{{ m.role }}{% endfor %}",
    "a loop with a condition": "{% for m in messages if m.content %}{{ m.role }}{% endfor %}",
    "a list of it": "{% for m in messages %}{{ [m.content] }}{% endfor %}",
    "a format": "{% for m in messages %}{{ '%5s' % m.content }}{% endfor %}",
    "a number of times": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "escaped by a neighbour": "{% for m in messages %}{{ ('<'|escape) + m.content }}{% endfor %}",
    "escaped": "{% autoescape true %}{% for m in messages %}{{ m.content }}{% endfor %}{% endautoescape %}",
    "a macro": "{% macro f(x) %}{{ x|length }}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
    "a namespace": "{% set n = namespace(x='') %}{% for m in messages %}{{ n.x }}{% set n.x = m.content %}{% endfor %}",
    "a block": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x|length }}{% endfor %}",
    "a filter on a block": "{% for m in messages %}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}",
    "the day": "{% for m in messages %}{{ strftime_now('%d') }}{{ m.content }}{% endfor %}",
    "chance": "{% for m in messages %}{{ [1]|random }}{{ m.content }}{% endfor %}",
    "a name of its own for an error": "{% set raise_exception = messages %}{{ raise_exception('x') }}",
    "a number of too many digits": "{{ " + "1" * 5000 + " }}",
    "a template of great length": "{{ messages[0].content }}" * 3000,
    "no template": "{% for m in messages %}",
}

ROLES = ("system", "user", "assistant", "user")
SAID = ("%s %d %%", "  <b>&amp;\n", "{{ x }}\\1", "\u2003\t")


def conversation(said):
    return [Message(role, text) for role, text in zip(ROLES, said, strict=False)]


def applied(tokenizer, template, said, *, add_generation_prompt=False):
    """Return what the tokenizer makes of a conversation, or the error."""
    messages = [{"role": message.role, "content": message.content} for message in conversation(said)]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except template_errors() as error:
        return str(error)


def written(tokenizer, template, said, *, add_generation_prompt=False):
    write = ChatTemplate(tokenizer, template)
    try:
        # The second time from its form, where there is one.
        first, second = (
            write([conversation(texts)], {}, add_generation_prompt=add_generation_prompt)[0] for texts in (said, said)
        )
    except template_errors() as error:
        return str(error)
    assert first == second
    return second


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_the_well_known_templates_those_that_only_write_are_known(name):
    assert only_writes(TEMPLATES[name].text) is (name in WRITES)


@pytest.mark.parametrize("name", ONLY_WRITE)
def test_a_template_that_only_writes_is_filled_in_as_it_is_applied(tokenizer, name):
    assert only_writes(ONLY_WRITE[name])
    for said in (SAID, SAID[::-1], ("a",), ("", " ", "a", " a ")):
        for asks in (False, True):
            expected = applied(tokenizer, ONLY_WRITE[name], said, add_generation_prompt=asks)
            assert written(tokenizer, ONLY_WRITE[name], said, add_generation_prompt=asks) == expected


@pytest.mark.parametrize("name", LOOK)
def test_a_template_that_looks_at_what_is_said_is_applied_to_every_conversation(tokenizer, name):
    assert not only_writes(LOOK[name])
    for said in (SAID, SAID[::-1]):
        assert written(tokenizer, LOOK[name], said) == applied(tokenizer, LOOK[name], said)


PARTS = ("|trim", "|length", "|upper", ".strip()", "[0]", "[1:]", ".content")
EXPRESSIONS = st.deferred(
    lambda: st.one_of(
        st.sampled_from(["m.content", "m.role", "m", "messages", "x", "loop.first", "'a'", "1", "messages[0].content"]),
        st.tuples(EXPRESSIONS, st.sampled_from(["+", "~", "==", "in", "and", "%"]), EXPRESSIONS).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(EXPRESSIONS, st.sampled_from(PARTS)).map(lambda parts: f"({parts[0]}){parts[1]}"),
        st.tuples(EXPRESSIONS, EXPRESSIONS, EXPRESSIONS).map(lambda parts: "({} if {} else {})".format(*parts)),
    )
)
STATEMENTS = st.deferred(
    lambda: st.lists(
        st.one_of(
            EXPRESSIONS.map("{{{{ {} }}}}".format),
            EXPRESSIONS.map("{{% set x = {} %}}".format),
            st.tuples(EXPRESSIONS, STATEMENTS, STATEMENTS).map(
                lambda parts: "{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format(*parts)
            ),
            st.tuples(EXPRESSIONS, STATEMENTS).map(lambda parts: "{{% for m in {} %}}{}{{% endfor %}}".format(*parts)),
        ),
        min_size=1,
        max_size=4,
    ).map("".join)
)


@given(STATEMENTS, st.lists(texts(" ", "%s"), min_size=2, max_size=4))
def test_any_template_that_is_said_to_only_write_does(tokenizer, template, said):
    if only_writes(template):
        assert written(tokenizer, template, said) == applied(tokenizer, template, said)
