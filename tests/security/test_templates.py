"""A chat template is somebody else's program: it does not leave its sandbox, and ends in time and memory."""

from __future__ import annotations

import gc
import signal
import threading
import time
from pathlib import Path

import pytest

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens import chat_template
from dpo_cli.data.tokens.conversation_text import ConversationText
from dpo_cli.data.tokens.encoding import TextEncoder
from dpo_cli.data.tokens.rendering import Renderer
from dpo_cli.errors import UserError
from dpo_cli.system import bounds
from dpo_cli.system.bounds import TookTooLong, bounded_memory, bounded_time
from tests.cli.test_bad_inputs import PREPARE
from tests.conftest import CHATML

PAIR = Pair((Message("user", "Say hi."),), (Message("assistant", "Hi."),), (Message("assistant", "No."),), "a.jsonl:1")

ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.mkdir('executed') }}",
    "globals of a function": "{{ lipsum.__globals__['os'].mkdir('executed') }}",
    "the attribute filter": "{{ (lipsum|attr('__globals__'))['os'].mkdir('executed') }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__init__.__globals__}'.format_map({'a': joiner}) }}",
    "the exception's globals": "{{ raise_exception.__globals__.keys() }}",
    "a name space": "{% set ns = namespace(__class__=1) %}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing a module": "{% import 'os' as os %}",
    "extending a file": "{% extends '/etc/passwd' %}",
}
GROWING = "{% set ns = namespace(x='0123456789') %}{% for _ in range(60) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(50) }}",
    "one long operation": "{% set n = messages|length + 8 %}{{ (n ** (n ** n)) > 1 }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
}
HUGE = {
    "a text times a number": "{{ 'x' * 10**11 }}",
    "what is said times a number": "{{ messages[0].content * 10**10 }}",
    "a text that doubles": GROWING.replace("OP", "~"),
    "a text that doubles by plus": GROWING.replace("OP", "+"),
    "a list that doubles": GROWING.replace("OP", "+").replace("'0123456789'", "[1]"),
    "a width": "{{ '%10000000000s' % 'x' }}",
    "a width of format": "{{ '{:>10000000000}'.format('x') }}",
    "a filter": "{{ 'x'|center(10**10) }}",
    "an indent": "{{ messages|tojson(indent=10**9) }}",
    "a long output": "{% for _ in range(99999) %}{{ 'x' * 500 }}{% endfor %}",
}
DEEP = {
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "conditions": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "loops": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture
def hasty(monkeypatch):
    """A bound on the time that is reached soon."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)


@pytest.fixture
def narrow(monkeypatch):
    """A bound on the memory that is reached before that on the time, however slow the machine is."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 60)
    monkeypatch.setattr(chat_template, "MAX_BYTES", 1 << 27)


def render(tokenizer, template, pairs=(PAIR, PAIR)):
    texts = ConversationText(tokenizer, {"default": template})
    return Renderer(texts, TextEncoder(tokenizer), "all")(pairs)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_tries_to_leave_its_sandbox_stays_in_it(project, tokenizer, name):
    for found in render(tokenizer, ESCAPES[name] + CHATML):
        # What is not to be had is refused, or as if it were not there.
        assert isinstance(found, BadRow) or "Say hi." in found.prompt
        assert isinstance(found, BadRow) or not any(word in found.prompt for word in ("class", "__", "root:"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_ended_and_named(hasty, tokenizer, name):
    with pytest.raises(UserError, match=r"chat template takes more than 0.2 seconds") as found:
        render(tokenizer, ENDLESS[name] + CHATML)
    assert found.value.where == "`model.chat_template`"
    assert found.value.hint


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_grows_without_bounds_is_ended_and_named(narrow, tokenizer, name):
    with pytest.raises(UserError, match=r"chat template (takes more than 128 MiB|writes [\d,]+ characters)") as found:
        render(tokenizer, HUGE[name] + CHATML)
    assert found.value.where == "`model.chat_template`"


@pytest.mark.parametrize("name", DEEP)
def test_a_template_that_is_too_deep_is_a_template_error(tokenizer, name):
    for found in render(tokenizer, DEEP[name] + CHATML):
        assert isinstance(found, BadRow)
        assert "the chat template fails" in found.detail


def test_the_tokenizers_own_template_is_named_as_such(hasty, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", ENDLESS["lipsum"] + CHATML)
    with pytest.raises(UserError) as found:
        render(tokenizer, tokenizer.chat_template)
    assert found.value.where == "the tokenizer's own chat template"


def test_a_template_without_an_end_ends_the_command(hasty, project, dpo):
    Path("template.jinja").write_text(ENDLESS["loops in loops"] + CHATML)
    result = dpo(f"{PREPARE} model.chat_template=template.jinja")
    assert result.status == 2
    ((error, hint),) = result.errors
    assert "chat template takes more than" in error
    assert "model.chat_template" in hint


def test_a_long_conversation_is_written_whatever_its_length(tokenizer):
    long = Message("user", "word " * 2_000_000)
    pair = Pair((long,), PAIR.chosen, PAIR.rejected, "a.jsonl:1")
    (found,) = render(tokenizer, CHATML, [pair])
    assert long.content in found.prompt


def test_what_is_said_is_not_written_over_and_over(tokenizer):
    long = Message("user", "word " * 40_000)
    pair = Pair((long, *PAIR.prompt), PAIR.chosen, PAIR.rejected, "a.jsonl:1")
    with pytest.raises(UserError, match=r"chat template writes [\d,]+ characters"):
        again = "{% for m in messages %}" + "{{ messages[0].content }}" * 8 + "{% endfor %}"
        render(tokenizer, again, [pair])


def test_many_short_turns_may_take_more_words_of_the_template_than_are_said(tokenizer):
    turns = tuple(Message(role, "word " * 40) for _ in range(5_000) for role in ("user", "assistant"))
    pair = Pair((*turns, *PAIR.prompt), PAIR.chosen, PAIR.rejected, "a.jsonl:1")
    wordy = "{% for m in messages %}" + "w" * 120 + "{{ m.content }}{% endfor %}"
    (found,) = render(tokenizer, wordy, [pair])
    assert found.prompt == "".join("w" * 120 + message.content for message in pair.prompt)


@pytest.mark.parametrize("template", ["{{ '\\ud800' }}", "{{ '%c' % 55296 }}"])
def test_a_template_that_writes_no_text_is_a_template_error(tokenizer, template):
    for found in render(tokenizer, template + CHATML):
        assert isinstance(found, BadRow)
        assert "half of a surrogate pair" in found.detail


def test_an_alarm_is_not_lost_in_what_the_garbage_collector_calls():
    def busy(phase, info):
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    gc.callbacks.append(busy)
    try:
        with pytest.raises(TookTooLong), bounded_time(0.05):
            end = time.process_time() + 3
            while time.process_time() < end:
                ring = []
                ring.append(ring)
    finally:
        gc.callbacks.remove(busy)


def test_bounds_leave_nothing_behind():
    import resource

    handler, limits = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(TookTooLong), bounded_time(0.05):
        while True:
            pass
    with pytest.raises(MemoryError), bounded_memory(1 << 24):
        bytearray(1 << 40)
    assert gc.isenabled()
    assert signal.getsignal(signal.SIGVTALRM) is handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_in_a_thread_that_signals_do_not_reach_nothing_is_bounded():
    reached: list[bool] = []

    def work() -> None:
        with bounds.bounded_time(1e-6):
            reached.append(sum(range(100_000)) > 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [True]
