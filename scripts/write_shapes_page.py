"""Write docs/shapes.md from the shapes themselves; with `--check` say whether it is current.

What the page says of a shape stands beside it: the docstring of the function that reads it, what the detection looks
at, and an example.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from written_page import write_or_check

from dpo_cli.data.pairs.conversations import ROLES
from dpo_cli.data.pairs.detection import DETECTION_ROWS
from dpo_cli.data.pairs.shapes import FORMATS, Shape

PAGE = Path(__file__).parent.parent / "docs" / "shapes.md"
HEAD = """# Shapes

A row of data becomes a pair: a prompt, and two responses of which one is better. How its columns say so is its shape.

| shape | the columns of the example |
|---|---|
"""
DETECTION = f"""
## Which shape

With `data.format: auto`, the default, the first {DETECTION_ROWS:,} rows of a source are compared with every shape,
by their columns and the kinds of values in them. The shape that most of them fit is the source's; of several, the first
in the table above. Each source has its own, and the output names it. Where no row fits any shape, the error lists the
columns that there are, and what `data.columns` would have to be, where their names tell; where they do not, the nearest
shape and what it lacks.

`data.format: NAME` takes one shape for granted, and every row that is not of it is a bad row.
"""
RENAMING = """
## Columns under other names

`data.columns` reads columns under the names that shapes know. The shape's name comes first, that of the data behind it:

    data:
      columns: {prompt: question, chosen: response_j, rejected: response_k}

Columns that are not in it keep their names. The rows are renamed before their shape is found out, so that everything on
this page goes for the new names. A column that no row has, and a name that the rows have already, are errors.

`data.system: "Answer briefly."` puts a turn of the system before conversations that have none. Where a row has one of
its own, in the column `system` or among its messages, the row's wins.

A source may have `columns` and `system` of its own, which then hold instead: `{path: …, columns: {prompt: query}}`;
`columns: {}` and `system: ""` leave its rows as they are.
"""
MESSAGES = """
## What a message is

A message is `{"role": …, "content": …}` or, as ShareGPT spells it, `{"from": …, "value": …}`; every shape takes both.

| role | is also called |
|---|---|
"""
REST = """
Upper and lower case do not matter. Any other role is an error. A turn of `function_call` or `tool_call` says, as JSON,
one call or a list of them (`{"name": …, "arguments": …}`), which become the turn's `tool_calls`.

A call is `{"type": "function", "function": {"name": …, "arguments": …}}`, as in OpenAI's format, or has name and
arguments itself. The arguments may be called `parameters`, `args` or `input` as well. However it is spelled, a call
becomes the same tokens. One that names no function, or has arguments under two of these names, is an error.

The content is text, or a list of parts `{"type": "text", "text": …}`, which are joined. It may be null in a turn that
calls tools. A message's `tool_calls`, `function_call`, `tool_call_id`, `name`, `tools` and `reasoning_content` (or
`reasoning`, or `thinking`, or the same thoughts in several) are given to the chat template. Nulls with which Parquet
and Arrow fill up objects count as not there.

A message with `"weight": 0` or `"train": false` is context and not scored, wherever it is in a response; 1 and true,
and null, say nothing. A response of which no turn is scored is refused.

CSV and TSV have no lists or objects: where one belongs, a cell holds its JSON. What Python's `str` makes of one is not
JSON and is refused. In other files text is text, and an answer that happens to be JSON is trained as it is written.

## Where the responses begin

The prompt is what both conversations begin with, and the responses begin at the first turn of the assistant in which
they differ. Everything behind it belongs to the response; the turns of others and what tools return are context, and
only the assistant's are judged.

- Turns of the assistant that follow each other are one answer: if they differ anywhere, the response begins at the
  first of them.
- Two conversations that part at a turn of the user, the system or a tool are no preference over one prompt. So are two
  of which one goes on where the other has ended, with a turn that is not the assistant's. Both are dropped and counted
  as `different contexts`.
- A response ends with a turn of the assistant. If a turn of it that is judged has neither visible text nor a tool call,
  the pair is dropped and counted as `empty response`.

## Other columns

| column | |
|---|---|
| `system` | text: the turn before all others; where the conversation has another of the system, the row is refused |
| `input` | where the question is text: what it works on, a text that follows below it |
| `history` | where the question is text: what was said before, a list of `[user, assistant]`, two texts each |
| `weight` | a number from 0, by which the pair's loss is multiplied |
| `margin` | a number: by how much the chosen response is better; losses use it where `margin_scale` is set |
| `source`, `category` | carried along, to break an evaluation down by; what is not text is kept as JSON |
| `tools` | a list of objects, given to the chat template |
| `chat_template_kwargs` | an object: further arguments of the chat template, such as `enable_thinking` |

All are optional, and null is the same as not there. The question is text in `instruction` and `text`, and may be in
`ranked`, `unpaired`, and `repeated` with lists that hold only answers; elsewhere `input` and `history` are left aside,
as any other column is. All others are read in every shape.

## What is refused

A refused row is counted by its reason and named by file and line; the message says which field it is, and where in it:
`chosen[2].content is a number instead of text`.

| reason | | |
|---|---|---|
| `undecodable row` | the line is not an object of JSON in UTF-8, or not as many fields as the header has | broken |
| `missing field` | a column, or a part of a message, is not there or null | broken |
| `wrong type` | text, number, list or object where another belongs | broken |
| `wrong role` | nobody known speaks | broken |
| `wrong length` | scores or ranks are not as many as responses; an exchange of the history is not two texts | broken |
| `wrong label` | a label is not true or false, 1 or 0; a winner is neither answer | broken |
| `scores against ranks` | scores call another answer the better one than ranks, or a winner or label, do | broken |
| `two thoughts` | a message has other thoughts in one field than in another | broken |
| `nothing scored` | no turn of a response is scored, by its `weight` or `train` | broken |
| `number out of range` | not finite with 32 bits, or a weight below 0 | broken |
| `undecodable text` | half of a surrogate pair | broken |
| `not text` | a column holds images or sounds, or the texts refer to those of one (`<image>`) | broken |
| `control token` | the tokenizer cannot write the characters of a control token, or makes one of other text | broken |
| `empty field` | nobody asks anything, or a list is empty | broken |
| `no human turn` | an HH text does not begin with `Human:` | broken |
| `no answer` | a conversation ends with a turn that is not the assistant's | broken |
| `prompt not repeated` | a list that should repeat the prompt begins with something else | broken |
| `prompt ends with an answer` | the last turn of the prompt is the assistant's | broken |
| `two system prompts` | one in the column `system` and one in the conversation | broken |
| `empty response` | a turn of the assistant that is judged says and calls nothing | dropped |
| `identical responses` | both responses are the same | dropped |
| `different contexts` | the two part at a turn that is not the assistant's | dropped |
| `no preference` | all scores or ranks of a list are equal; two answers are a tie | dropped |
| `no counterpart` | an answer is left over for which there is no other of the opposite label | dropped |

What is broken stops the run, or is dropped as well with `data.on_bad_row: drop`.
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
