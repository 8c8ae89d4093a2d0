"""A `Modelfile` lets Ollama write conversations as the model's own chat template does, or says that it cannot."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from transformers import GenerationConfig

from dpo_cli.modeling.gguf.modelfile import modelfile
from tests.modeling.gguf.families import CHATML, GEMMA, LLAMA_2, PHI_3, WORDS, byte_level, family, llama_2
from tests.modeling.gguf.go_template import apply, chat, commands

LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{{ (bos_token if loop.first else '') + text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
MISTRAL_V3 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and s is defined %}{{ '[INST] ' + s + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ALPACA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% set messages = messages[1:] %}"
    "{% else %}{{ 'Below is an instruction. Write a response.\n\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n### Response:\n' }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
QUOTED = (
    '{% for m in messages %}{{ m.role + \' """{{ x }}\\r\n\' + m.content + \'"""\n\' }}{% endfor %}'
    '{% if add_generation_prompt %}{{ \'assistant """{{ x }}\\r\n\' }}{% endif %}'
)

KNOWN = {
    "ChatML": CHATML, "Llama 2": LLAMA_2, "Llama 3": LLAMA_3, "Qwen": QWEN, "Mistral": MISTRAL_V3, "Gemma": GEMMA,
    "Phi-3": PHI_3, "Zephyr": ZEPHYR, "Alpaca": ALPACA, "thinking": THINKING, "quotes": QUOTED,
}  # fmt: skip

QUESTIONS = ('Why?\n"""No {{ end }}"""', "Ja, {{ .System }} & <b>", "日本 'x'", "4?")
ANSWERS = ("Since\n\n{% x %}", "`b`", "c")
SYSTEM = 'Be "brief".\n{{ if .System }}'


def of(template: str | None, **settings: Any) -> Any:
    tokenizer = byte_level(None, WORDS)
    tokenizer.chat_template = template
    return tokenizer


def found(text: str, name: str) -> list[str]:
    return [value for key, value in commands(text) if key == name]


def talk(turns: int, system: bool) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": question} for question in QUESTIONS[:turns]]
    answered = [{"role": "assistant", "content": answer} for answer in ANSWERS[: turns - 1]]
    both = itertools.chain.from_iterable(itertools.zip_longest(asked, answered))
    return [*([{"role": "system", "content": SYSTEM}] if system else []), *(turn for turn in both if turn)]


@pytest.mark.parametrize("name", KNOWN)
def test_conversations_are_written_as_the_template_writes_them(name: str) -> None:
    tokenizer = of(KNOWN[name])
    (template,) = found(modelfile("x.gguf", tokenizer), "TEMPLATE")
    for turns, system in itertools.product((1, 2, 3, 4), (False, True) if name != "Gemma" else (False,)):
        messages = talk(turns, system)
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat(template, messages) == expected, (turns, system)


@pytest.mark.parametrize("name", KNOWN)
def test_an_answer_that_is_begun_goes_on_where_it_ends(name: str) -> None:
    tokenizer = of(KNOWN[name])
    (template,) = found(modelfile("x.gguf", tokenizer), "TEMPLATE")
    messages = [*talk(1, system=False), {"role": "assistant", "content": "So"}]
    assert chat(template, messages).endswith("So")
    assert "Why?" in chat(template, messages)


def test_a_system_message_that_the_template_refuses_comes_before_the_first_question() -> None:
    text = modelfile("x.gguf", of(GEMMA))
    assert "# The model's chat template takes no system message: one is put before the first question." in text
    (template,) = found(text, "TEMPLATE")
    plain = chat(template, talk(2, system=False))
    assert chat(template, talk(2, system=True)) == plain.replace("Why?", f"{SYSTEM}\n\nWhy?", 1)


def test_a_token_that_the_reader_puts_before_texts_is_not_written_again() -> None:
    tokenizer = llama_2(chat_template=LLAMA_2)
    (template,) = found(modelfile("x.gguf", tokenizer), "TEMPLATE")
    for system in (False, True):
        messages = talk(3, system)
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert "<s>" + chat(template, messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ m.content ~ '\n' }}{% endfor %}",
        CHATML.replace("m['content']", "m['content'] | upper"),
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content | length }} {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content + ('!' if '日' in m.content else '') }}\n{% endfor %}",
    ],
)
def test_a_template_that_does_more_is_left_to_ollama(template: str) -> None:
    text = modelfile("x.gguf", of(template), [2])
    assert found(text, "TEMPLATE") == []
    assert "# No TEMPLATE: the model's chat template does more than put texts around messages." in text
    assert found(text, "FROM") == ["./x.gguf"]
    assert found(text, "PARAMETER stop") == ["<|im_end|>"]


def test_without_a_template_prompts_are_taken_as_they_are() -> None:
    (template,) = found(modelfile("x.gguf", of(None)), "TEMPLATE")
    assert apply(template, {"Prompt": "Once upon"}) == "Once upon"


def test_tokens_that_end_an_answer_are_stops() -> None:
    tokenizer = of(CHATML)
    tokenizer.add_tokens(['"quoted"', "two\nlines", 'ends with "'], special_tokens=True)
    names = ["<|im_end|>", "<|endoftext|>", '"quoted"', "two\nlines", 'ends with "']
    stops = tokenizer.convert_tokens_to_ids(names)
    text = modelfile("my model.gguf", tokenizer, stops[::-1])
    assert found(text, "PARAMETER stop") == names
    assert found(text, "FROM") == ["./my model.gguf"]
    assert found(modelfile("x.gguf", tokenizer), "PARAMETER stop") == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, {}),
        ({"do_sample": False}, {"temperature": "0", "repeat_penalty": "1"}),
        ({"do_sample": False, "repetition_penalty": 1.2}, {"temperature": "0", "repeat_penalty": "1.2"}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05},
            {"temperature": "0.6", "top_p": "0.95", "top_k": "20", "min_p": "0.05", "repeat_penalty": "1"},
        ),
        # What is not set is what transformers samples by, where Ollama would sample by other numbers.
        ({"do_sample": True}, {"temperature": "1", "top_p": "1", "top_k": "50", "repeat_penalty": "1"}),
    ],
)
def test_answers_are_sampled_as_the_model_says(settings: dict[str, Any] | None, expected: dict[str, str]) -> None:
    text = modelfile("x.gguf", family("SmolLM"), [2], None if settings is None else GenerationConfig(**settings))
    said = {name.split(" ")[1]: value for name, value in commands(text) if name.startswith("PARAMETER")}
    assert said.pop("stop") == "<|im_end|>"
    assert said == expected


def test_the_evaluator_reads_templates_as_go_does() -> None:
    """Examples with their results from Go's documentation, of what ours and Ollama's own library use."""
    values = {"A": "x", "B": "", "L": ["p", "q"]}
    for template, expected in {
        "{{ .A }}-{{ .B }}": "x-",
        "a {{- .A -}} \n b": "axb",
        '{{ "{{" }} {{ "a\\"b\\n" }}': '{{ a"b\n',
        "{{ if .B }}1{{ else if .A }}2{{ else }}3{{ end }}": "2",
        "{{ if and .A (not .B) }}y{{ end }}": "y",
        "{{ range $i, $x := .L }}{{ $i }}{{ $x }}{{ if eq (len (slice $.L $i)) 1 }}!{{ end }}{{ end }}": "0p1q!",
    }.items():
        assert apply(template, values) == expected
