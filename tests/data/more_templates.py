"""Templates in the manner of well-known ones that differ in how they write calls of tools, or in where a system speaks.

They are for the tokenizer of Qwen 3's kind, whose tokens end a turn with `<|im_end|>`; `LATE` is for Mistral's.
"""

from __future__ import annotations

_TURN = r"""
{%- if tools -%}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}CALL{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def _with_call(call: str) -> str:
    return _TURN.replace("CALL", call)


TOOL_TEMPLATES = {
    "Qwen 2.5": _with_call(
        "{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}"
        """{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}"""
        "{{- (call.arguments | tojson) + '}\\n</tool_call>' -}}"
    ),
    "Llama 3.1": _with_call(
        "{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') -}}{%- endif -%}"
        """{{- '{"name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) + '}' -}}"""
    ),
    "gpt-oss": _with_call("{{- ' to=functions.' + call.function.name + ' json' + (call.function.arguments|tojson) -}}"),
    "GLM 4.5": _with_call(
        "{{- '\\n<tool_call>' + call.function.name -}}"
        "{%- for key, value in call.function.arguments.items() -%}"
        "{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' -}}"
        "{{- value if value is string else value | tojson(ensure_ascii=False) -}}{{- '</arg_value>' -}}"
        "{%- endfor -%}{{- '\\n</tool_call>' -}}"
    ),
    "Qwen 3 itself": _with_call(
        """{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}"""
        "{%- if call.function.arguments is string -%}{{- call.function.arguments -}}"
        "{%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}{{- '}\\n</tool_call>' -}}"
    ),
    "DeepSeek V3": _with_call(
        "{{- '<|fim_hole|>' + call.type + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' -}}"
    ),
    "joined with a tilde": _with_call("{{- call.function.name ~ ': ' ~ call.function.arguments -}}"),
    "calls of described tools": _with_call(
        "{%- if tools -%}{{- call.function.name + ': ' + (call.function.arguments | tojson) -}}{%- endif -%}"
    ),
}
"""Templates by how they write calls."""

WANT_TEXT = ("DeepSeek V3", "joined with a tilde")
"""Those of them that want arguments as text."""

LATE = r"""
{{- bos_token -}}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{%- set has_system = loop.last and messages[0].role == 'system' -%}
{{- '[INST] ' + (messages[0].content + '\n\n' if has_system else '') + message.content + '[/INST]' -}}
{%- else -%}
{{- ' ' + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
"""Mistral v0.3's kind: the system speaks in the last user's turn, if no answer follows."""
