"""Write docs/shapes.md from the shapes themselves; with `--check` say whether it is current.

Each shape is described in its own place: by the docstring of the function that reads it, what detection checks, and an
example.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from written_page import write_or_check

from dpo_cli.data.pairs.detection import DETECTION_ROWS
from dpo_cli.data.pairs.messages import ROLES
from dpo_cli.data.pairs.shapes import FORMATS, Shape

PAGE = Path(__file__).parent.parent / "docs" / "shapes.md"
HEAD = """# Shapes

A row of data becomes a pair: a prompt and two responses, one better than the other. The shape of a row is the way its
columns express this.

| shape | the columns of the example |
|---|---|
"""
DETECTION = f"""
## Detection

With `data.format: auto`, the default, the first {DETECTION_ROWS:,} rows of a source are compared with every shape, by
their columns and the types of their values. The source has the shape that most rows match; if several match, the first
in the table above. Each source has its own shape, and the output names it. If no row matches any shape, the error
lists the columns of the rows and proposes `data.columns` if their names allow it; otherwise it names the nearest shape
and its missing columns.

`data.format: NAME` sets the shape, and every row of another shape is a bad row.
"""
RENAMING = """
## Columns under other names

`data.columns` maps the names that shapes know to those of the data. The shape's name comes first:

    data:
      columns: {prompt: question, chosen: response_j, rejected: response_k}

Other columns keep their names. Columns are renamed before the shape is detected, so that everything on this page
applies to the new names. A column that no row has, and a name that the rows already have, are errors.

`data.system: "Answer briefly."` adds a system message to conversations without one. A row's own system message, in the
column `system` or among its messages, takes precedence.

A source may have its own `columns` and `system`, which replace these settings: `{path: …, columns: {prompt: query}}`;
`columns: {}` and `system: ""` leave its rows unchanged.
"""
MESSAGES = """
## Messages

A message is `{"role": …, "content": …}` or, as in ShareGPT, `{"from": …, "value": …}`; every shape accepts both.

| role | aliases |
|---|---|
"""
REST = """
Upper and lower case do not matter. Any other role is an error. The content of a turn of `function_call` or `tool_call`
is one call or a list of calls as JSON (`{"name": …, "arguments": …}`), which become the turn's `tool_calls`.

A call is `{"type": "function", "function": {"name": …, "arguments": …}}`, as in OpenAI's format, or only the inner
object. The arguments may also be called `parameters`, `args` or `input`. All spellings of a call become the same
tokens. A call without a name, or with arguments under two of these names, is an error.

The content is text, or a list of parts `{"type": "text", "text": …}`, which are joined. It may be null in a turn that
calls tools. A message's `tool_calls`, `function_call`, `tool_call_id`, `name`, `tools` and `reasoning_content` (or
`reasoning`, or `thinking`, or the same text in several) are passed to the chat template. Nulls that Parquet and Arrow
add to objects are ignored.

A message with `"weight": 0` or `"train": false` is context and not scored, wherever it is in a response; 1, true
and null have no effect. A response without a scored turn is refused.

CSV and TSV have no lists or objects: a cell for one contains its JSON. The output of Python's `str` is not JSON and is
refused. In other files text is text, and an answer that happens to be JSON is trained as it is written.

## Where the responses begin

The prompt is the common beginning of both conversations, and the responses begin at the first turn of the assistant in
which they differ. Everything after that belongs to the response. Turns of others and results of tools are context; only
the assistant's turns are scored.

- Consecutive turns of the assistant are one answer: if they differ anywhere, the response begins at the first of them.
- Two conversations that diverge at a turn of the user, the system or a tool are not a preference for one prompt.
  Neither are two conversations of which one continues with a turn that is not the assistant's where the other has
  ended. Both are dropped and counted as `different contexts`.
- A response ends with a turn of the assistant. If a scored turn has neither visible text nor a tool call,
  the pair is dropped and counted as `empty response`.

## Other columns

| column | |
|---|---|
| `system` | text: the system message; if the conversation has a different one, the row is refused |
| `input` | if the question is text: the input that it refers to, placed below it |
| `history` | if the question is text: the earlier turns, a list of `[user, assistant]` pairs of texts |
| `weight` | a number, at least 0, that multiplies the pair's loss |
| `margin` | a number: how much better the chosen response is; losses use it if `margin_scale` is set |
| `source`, `category` | groups for `dpo eval`; values other than text are kept as JSON |
| `tools` | a list of objects, passed to the chat template |
| `chat_template_kwargs` | an object: further arguments for the chat template, such as `enable_thinking` |

All are optional, and null means missing. The question is text in `instruction` and `text`, and may be text in
`ranked`, `unpaired`, and `repeated` with lists of answers only; in other shapes `input` and `history` are ignored, like
unknown columns. All others are read in every shape.

## Refused rows

A refused row is counted by its reason and reported with file and line; the message names the field and the place in it:
`chosen[2].content is a number instead of text`.

| reason | | |
|---|---|---|
| `undecodable row` | the line is not a JSON object in UTF-8, or has another number of fields than the header | broken |
| `missing field` | a column, or a part of a message, is missing or null | broken |
| `wrong type` | a text, number, list or object in the place of another type | broken |
| `wrong role` | the role of a message is unknown | broken |
| `wrong length` | there are more or fewer scores or ranks than responses; a history entry is not two texts | broken |
| `wrong label` | a label is not true or false, 1 or 0; a winner is neither answer | broken |
| `scores against ranks` | scores contradict ranks, a winner or a label | broken |
| `two thoughts` | a message has different reasoning in two fields | broken |
| `nothing scored` | no turn of a response is scored, by its `weight` or `train` | broken |
| `number out of range` | not finite as a 32-bit number, or a weight below 0 | broken |
| `undecodable text` | half of a surrogate pair | broken |
| `not text` | a column holds images or sounds, or the texts refer to those of one (`<image>`) | broken |
| `control token` | the tokenizer cannot encode a control token as text, or turns other text into one | broken |
| `empty field` | there is no question, or a list is empty | broken |
| `no human turn` | an HH text does not begin with `Human:` | broken |
| `no answer` | a conversation ends with a turn that is not the assistant's | broken |
| `prompt not repeated` | a list that should repeat the prompt begins with something else | broken |
| `prompt ends with an answer` | the last turn of the prompt is the assistant's | broken |
| `two system prompts` | one in the column `system` and one in the conversation | broken |
| `empty response` | a scored turn of the assistant has neither text nor a call | dropped |
| `identical responses` | both responses are the same | dropped |
| `different contexts` | the conversations diverge at a turn that is not the assistant's | dropped |
| `no preference` | all scores or ranks of a list are equal; two answers are a tie | dropped |
| `no counterpart` | an answer has no counterpart with the opposite label | dropped |

A broken row stops the run, or is dropped with `data.on_bad_row: drop`.
"""
TAIL = "\nThis page is written by `scripts/write_shapes_page.py`.\n"


def example(row: Mapping[str, object]) -> str:
    """Write a row as JSON, a column a line."""
    columns = [f"      {json.dumps(name)}: {written(value)}" for name, value in row.items()]
    return "    {\n" + ",\n".join(columns) + "\n    }\n"


def written(value: object) -> str:
    """Write a value as JSON; of several messages, each on a line of its own."""
    if isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"        {json.dumps(message)}" for message in value) + "\n      ]"
    return json.dumps(value)


def roles() -> str:
    """Return a row for each role, with its other names."""
    lines = []
    for role in dict.fromkeys(ROLES.values()):
        others = ", ".join(f"`{name}`" for name, meant in ROLES.items() if meant == role and name != role)
        lines.append(f"| `{role}` | {others} |\n")
    return "".join(lines)


def section(name: str, shape: Shape) -> str:
    """Return everything about one shape."""
    about, *more = (inspect.getdoc(shape.read) or "").removeprefix("Read ").split("\n\n")
    paragraphs = "".join("\n" + " ".join(paragraph.split()) + "\n" for paragraph in more)
    return (
        f"\n## {name}\n\n{' '.join(about.split())}\n\n{example(shape.example)}{paragraphs}\n"
        f"**Detected where** {shape.looks_at} **Forced by** `data.format: {name}`.\n"
    )


def overview() -> str:
    """Return a row for each shape."""
    return "".join(
        f"| [{name}](#{name}) | {', '.join(f'`{column}`' for column in shape.example)} |\n"
        for name, shape in FORMATS.items()
    )


def page() -> str:
    """Return the whole page."""
    sections = [section(name, shape) for name, shape in FORMATS.items()]
    return "".join([HEAD, overview(), DETECTION, RENAMING, *sections, MESSAGES, roles(), REST, TAIL])


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
