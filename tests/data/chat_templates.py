"""Chat templates in the manner of well-known ones, and by hand what each makes of one conversation.

In an expectation the parts between ⟦ and ⟧ are judged; what stands before the first ⟦ is the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dpo_cli.data.records import Message, Pair

TEXTS = ("Be brief.", "Hi", "Hello.", "Add 2 and 2.", "Let me see.", "Go on.", "It is four.")
"""What is said in the conversation: system, user, assistant, user; then assistant, user, assistant."""

THOUGHTS = ("A greeting.", "A sum.", "Two twos.")
"""What is thought before each of the assistant's turns, under the templates that know of thinking."""

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what is to be known of it.

    Attributes:
        text: The Jinja template.
        special: The tokenizer's special tokens; of them, `bos`, `eos` and `ends`.
        with_user: The conversation of `TEXTS` written out.
        with_tool: The same with a tool's result, `4`, in place of `Go on.`; empty where there are no tools.
        bos: The token that begins a sequence, where the template writes one.
        eos: The tokenizer's end-of-sequence token.
        ends: The tokens that end the assistant's turns.
        added: Further tokens that the tokenizer never breaks up, though they are not special.
        opens: What the generation prompt writes and the whole conversation does not.
        thinks: Whether it knows of `<think>`.
        system: Whether a system message is a turn, is refused, or moves into the last of the user's turns.
        engine: How the tokenizer works: on bytes, or on pieces whose spaces are `▁`.
    """

    text: str
    special: tuple[str, ...]
    with_user: str
    eos: str
    ends: tuple[str, ...]
    with_tool: str = ""
    bos: str = ""
    added: tuple[str, ...] = ()
    opens: str = ""
    thinks: bool = False
    system: Literal["turn", "refused", "moves"] = "turn"
    engine: Literal["bytes", "pieces"] = "bytes"

    def example(self, between: Literal["user", "tool"] = "user", texts: Sequence[str] = TEXTS) -> Pair:
        """Return the conversation whose way on is `with_user` or `with_tool`."""
        system, greeting, greeted, question, first, aside, last = texts
        greeted, first, last = (self.thought(*both) for both in zip((greeted, first, last), THOUGHTS, strict=True))
        asked = (Message("user", greeting), Message("assistant", greeted), Message("user", question))
        calls = {"tool_calls": [CALL]} if between == "tool" else {}
        answered = Message("tool", "4", extras={"name": "add"}) if between == "tool" else Message("user", aside)
        has_system = self.system == "turn" or (self.system == "moves" and between == "tool")
        return Pair(
            (Message("system", system), *asked) if has_system else asked,
            (Message("assistant", first, extras=calls), answered, Message("assistant", last)),
            (Message("assistant", self.thought("I cannot.", "Too hard.")),),
            "f:1",
        )

    def thought(self, text: str, thought: str) -> str:
        """Return a turn of the assistant, the thought before it where the template knows of thinking."""
        return f"<think>\n{thought}\n</think>\n\n{text}" if self.thinks else text

    def written(self, texts: Sequence[str]) -> str:
        """Return `with_user` with other texts in place of `TEXTS`."""
        others = dict(zip(TEXTS, texts, strict=True))
        return re.sub("|".join(map(re.escape, TEXTS)), lambda match: others[match[0]], self.with_user)

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens that are never broken up."""
        return (*self.special, *self.added)


# The roles stand in the headers as they are; a newline follows each turn's end.
CHATML = ChatTemplate(
    text=r"""
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    ends=("<|im_end|>",),
    with_user=(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 2.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Let me see.<|im_end|>\n⟧<|im_start|>user\nGo on.<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is four.<|im_end|>\n⟧"
    ),
    with_tool=(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 2.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Let me see.<|im_end|>\n⟧<|im_start|>tool\n4<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is four.<|im_end|>\n⟧"
    ),
)

# The system message stands within the first user turn; BOS before each exchange; no header before an answer.
LLAMA_2 = ChatTemplate(
    text=r"""
{%- set opening, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}
{%- set opening, turns = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('user and assistant take turns') -}}
{%- endif -%}
{%- if message.role == 'user' -%}
{{- bos_token + '[INST] ' + (opening if loop.first else '') + message.content.strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message.content.strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
""",
    special=("<s>", "</s>"),
    bos="<s>",
    eos="</s>",
    ends=("</s>",),
    engine="pieces",
    with_user=(
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Add 2 and 2. [/INST]"
        "⟦ Let me see. </s>⟧<s>[INST] Go on. [/INST]⟦ It is four. </s>⟧"
    ),
)

# Headers between special tokens; texts are trimmed; a call is written in place of the text.
LLAMA_3 = ChatTemplate(
    text=r"""
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'ipython' if message.role == 'tool' else message.role -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' -}}
{%- if message.tool_calls -%}
{%- set call = message.tool_calls[0].function -%}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' -}}
{%- else -%}
{{- message.content | trim -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
""",
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    ends=("<|eot_id|>",),
    with_user=(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 2.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Let me see.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nGo on.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is four.<|eot_id|>⟧"
    ),
    with_tool=(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 2.<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is four.<|eot_id|>⟧"
    ),
)

# System message and tools move into the last of the user's turns, wherever that is; no header before an answer.
MISTRAL = ChatTemplate(
    text=r"""
{%- set found = namespace(last=0) -%}
{%- for message in messages if message.role == 'user' -%}{%- set found.last = found.last + 1 -%}{%- endfor -%}
{%- set found.num = 0 -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set found.num = found.num + 1 -%}
{%- if found.num == found.last and tools -%}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{%- set has_system = found.num == found.last and messages[0].role == 'system' -%}
{{- '[INST] ' + (messages[0].content + '\n\n' if has_system else '') + message.content + '[/INST]' -}}
{%- elif message.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in message.tool_calls -%}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}' -}}
{{- '' if loop.last else ', ' -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' + (message.content | trim) + eos_token -}}
{%- elif message.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) + '}[/TOOL_RESULTS]' -}}
{%- endif -%}
{%- endfor -%}
""",
    special=(
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    bos="<s>",
    eos="</s>",
    ends=("</s>",),
    system="moves",
    engine="pieces",
    with_user=(
        "<s>[INST] Hi[/INST] Hello.</s>[INST] Add 2 and 2.[/INST]"
        "⟦ Let me see.</s>⟧[INST] Go on.[/INST]⟦ It is four.</s>⟧"
    ),
    with_tool=(
        "<s>[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nAdd 2 and 2.[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 2}}]</s>⟧'
        '[TOOL_RESULTS] {"content": "4"}[/TOOL_RESULTS]⟦ It is four.</s>⟧'
    ),
)

# Raises on system messages; the assistant is called model; a turn's end is not the tokenizer's end of sequence.
GEMMA = ChatTemplate(
    text=r"""
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('system messages have no place here') -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('user and assistant take turns') -}}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else 'user' -%}
{{- '<start_of_turn>' + role + '\n' + (message.content | trim) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
""",
    special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    eos="<eos>",
    ends=("<end_of_turn>",),
    system="refused",
    engine="pieces",
    with_user=(
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nAdd 2 and 2.<end_of_turn>\n<start_of_turn>model\n⟦Let me see.<end_of_turn>\n⟧"
        "<start_of_turn>user\nGo on.<end_of_turn>\n<start_of_turn>model\n⟦It is four.<end_of_turn>\n⟧"
    ),
)

# A conversation without a generation prompt is closed by the end of the sequence, behind the end of the turn.
PHI_3 = ChatTemplate(
    text=r"""
{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}
""",
    special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|endoftext|>",
    ends=("<|end|>",),
    engine="pieces",
    with_user=(
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nAdd 2 and 2.<|end|>\n<|assistant|>\n⟦Let me see.<|end|>\n⟧"
        "<|user|>\nGo on.<|end|>\n<|assistant|>\n⟦It is four.<|end|>\n<|endoftext|>⟧"
    ),
)

# The headers are ordinary text; every turn, the user's too, ends with the end of the sequence.
ZEPHYR = ChatTemplate(
    text=r"""
{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
""",
    special=("<s>", "</s>"),
    eos="</s>",
    ends=("</s>",),
    with_user=(
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n"
        "<|user|>\nAdd 2 and 2.</s>\n<|assistant|>\n⟦Let me see.</s>\n⟧"
        "<|user|>\nGo on.</s>\n<|assistant|>\n⟦It is four.</s>\n⟧"
    ),
)

# Thoughts are kept after the last of the user's turns alone, and there the last answer always has a place for them;
# tool results stand in a user's turn, several in one; `enable_thinking` false closes the thoughts beforehand.
QWEN_3 = ChatTemplate(
    text=r"""
{%- if tools -%}
{{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') -}}
{{- '# Tools\n\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- set found = namespace(last_query=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set found.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' -}}
{%- elif message.role == 'assistant' -%}
{%- set content, reasoning = message.content, message.reasoning_content or '' -%}
{%- if not reasoning and '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > found.last_query and (loop.last or reasoning) -%}
{{- '<think>\n' + reasoning + '\n</think>\n\n' -}}
{%- endif -%}
{{- content -}}
{%- for call in message.tool_calls or [] -%}
{{- ('\n' if content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name -}}
{{- '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{{- '' if loop.previtem.role == 'tool' else '<|im_start|>user' -}}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
""",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added=(
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        "<|fim_hole|>",  # Which the template does not speak of.
    ),
    eos="<|im_end|>",
    ends=("<|im_end|>",),
    thinks=True,
    with_user=(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 2.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Let me see.<|im_end|>\n⟧<|im_start|>user\nGo on.<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nTwo twos.\n</think>\n\nIt is four.<|im_end|>\n⟧"
    ),
    with_tool=(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 2.<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nA sum.\n</think>\n\nLet me see.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>\n⟧'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nTwo twos.\n</think>\n\nIt is four.<|im_end|>\n⟧"
    ),
)

# All thoughts are struck out, those of the last answer too, but the generation prompt opens them;
# an answer to a tool's result has no header. Of its tokens only the first and the last of a text are special.
DEEPSEEK_R1 = ChatTemplate(
    text=r"""
{{- bos_token + (messages[0].content if messages[0].role == 'system' else '') -}}
{%- set seen = namespace(tool=false) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set seen.tool = false -%}
{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{- ('' if seen.tool else '<｜Assistant｜>') + message.content.split('</think>')[-1] -}}
{%- set seen.tool = false -%}
{%- for call in message.tool_calls or [] -%}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' -}}
{{- (call.function.arguments | tojson) + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- eos_token -}}
{%- elif message.role == 'tool' -%}
{%- set seen.tool = true -%}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not seen.tool -%}{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}
""",
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    added=(
        *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        *("<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    ),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    ends=("<｜end▁of▁sentence｜>",),
    opens="<think>\n",
    thinks=True,
    with_user=(
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>\n\nHello.<｜end▁of▁sentence｜>"
        "<｜User｜>Add 2 and 2.<｜Assistant｜>⟦\n\nLet me see.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Go on.<｜Assistant｜>⟦\n\nIt is four.<｜end▁of▁sentence｜>⟧"
    ),
    with_tool=(
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>\n\nHello.<｜end▁of▁sentence｜>"
        "<｜User｜>Add 2 and 2.<｜Assistant｜>⟦\n\nLet me see."
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 2, "b": 2}<｜tool▁call▁end｜><｜end▁of▁sentence｜>⟧'
        "<｜tool▁output▁begin｜>4<｜tool▁output▁end｜>⟦\n\nIt is four.<｜end▁of▁sentence｜>⟧"
    ),
)

# Speakers are tokens of their own; texts are stripped; tool results are spoken by the system.
COMMAND_R = ChatTemplate(
    text=r"""
{{- bos_token -}}
{%- set speakers = {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} -%}
{%- for message in messages -%}
{{- '<|START_OF_TURN_TOKEN|>' + speakers.get(message.role, '<|SYSTEM_TOKEN|>') -}}
{%- if message.role == 'tool' -%}
{{- '<results>\n' + message.content.strip() + '\n</results>' -}}
{%- else -%}
{{- message.content.strip() -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '\nAction: {"tool_name": "' + call.function.name + '", "parameters": ' -}}
{{- (call.function.arguments | tojson) + '}' -}}
{%- endfor -%}
{{- '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}
""",
    special=(
        *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    ends=("<|END_OF_TURN_TOKEN|>",),
    with_user=(
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Add 2 and 2.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Let me see.<|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Go on.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦It is four.<|END_OF_TURN_TOKEN|>⟧"
    ),
    with_tool=(
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Add 2 and 2.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Let me see.\n"
        'Action: {"tool_name": "add", "parameters": {"a": 2, "b": 2}}<|END_OF_TURN_TOKEN|>⟧'
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n4\n</results><|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦It is four.<|END_OF_TURN_TOKEN|>⟧"
    ),
)

# No generation prompt: who speaks next is the model's to say, so that the assistant's name is judged too.
NO_GENERATION_PROMPT = ChatTemplate(
    text=r"""
{%- for message in messages -%}
{{- (message.role | capitalize) + ': ' + message.content + (eos_token if message.role == 'assistant' else '') + '\n' -}}
{%- endfor -%}
""",
    special=("</s>",),
    eos="</s>",
    ends=("</s>",),
    with_user=(
        "System: Be brief.\nUser: Hi\nAssistant: Hello.</s>\nUser: Add 2 and 2.\n"
        "⟦Assistant: Let me see.</s>\n⟧User: Go on.\n⟦Assistant: It is four.</s>\n⟧"
    ),
)

# Raises on system messages; the generation prompt ends at a colon, and a space begins the response.
OPENCHAT = ChatTemplate(
    text=r"""
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- raise_exception('this model takes no system message') -}}{%- endif -%}
{{- 'Correct ' + (message.role | title) + ': ' + message.content + '<|end_of_turn|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Correct Assistant:' -}}{%- endif -%}
""",
    special=("<s>", "</s>", "<|end_of_turn|>"),
    bos="<s>",
    eos="</s>",
    ends=("<|end_of_turn|>",),
    system="refused",
    with_user=(
        "<s>Correct User: Hi<|end_of_turn|>Correct Assistant: Hello.<|end_of_turn|>"
        "Correct User: Add 2 and 2.<|end_of_turn|>Correct Assistant:⟦ Let me see.<|end_of_turn|>⟧"
        "Correct User: Go on.<|end_of_turn|>Correct Assistant:⟦ It is four.<|end_of_turn|>⟧"
    ),
)

# The last answer ends with another token than those before it; the model itself names the channel it speaks on.
HARMONY = ChatTemplate(
    text=r"""
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content -}}
{{- '<|return|>' if loop.last else '<|end|>' -}}
{%- else -%}
{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
""",
    special=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    eos="<|return|>",
    ends=("<|end|>", "<|return|>"),
    with_user=(
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
        "<|start|>user<|message|>Add 2 and 2.<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Let me see.<|end|>⟧"
        "<|start|>user<|message|>Go on.<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>It is four.<|return|>⟧"
    ),
)

TEMPLATES = {
    "ChatML": CHATML,
    "Llama 2": LLAMA_2,
    "Llama 3": LLAMA_3,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Phi-3": PHI_3,
    "Zephyr": ZEPHYR,
    "Qwen 3": QWEN_3,
    "DeepSeek-R1": DEEPSEEK_R1,
    "Command R": COMMAND_R,
    "no generation prompt": NO_GENERATION_PROMPT,
    "OpenChat": OPENCHAT,
    "Harmony": HARMONY,
}
