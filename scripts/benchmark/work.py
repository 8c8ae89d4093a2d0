"""What the benchmark needs of torch: the workloads, and the arithmetic that they cannot do without.

It runs in a process of its own (`prepare`) and answers in JSON on standard output: a process inherits the
peak memory of the one that starts it, so the benchmark itself must stay small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from benchmark.shapes import SHAPES
from dpo_cli.data.pairs.shapes import FORMATS
from dpo_cli.data.records import BadRow
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import empty_policy, load_policy
from dpo_cli.modeling.folders.saving import saved_model, write_model
from dpo_cli.modeling.folders.tokenizers import load_tokenizer

MAX_LENGTH = 1024
FIELDS = ("instruction", "input", "chosen", "rejected")
# Tokens of the joined texts alone; a chat template adds some thirty to the prompt and two to a response.
LONG_TOKENS = {"instruction": 148, "chosen": 353, "rejected": 285}
# More than one list takes, so that no two rows begin alike, and no divisor of the number of demo pairs.
LONG_STRIDE = 29

Row = dict[str, str]


class NotCounted(Exception):
    """The model multiplies matrices in modules whose arithmetic is not known here."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a pair, or of many together: prompt, chosen and rejected response."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Arithmetic:
    """What a forward pass costs, in floating-point operations.

    Attributes:
        per_token: Matrix products of the model's body, for a token.
        per_attended: Both products of attention in all layers, for a query and a key that it attends to.
        per_response_token: The projection on the vocabulary, for a response token.
    """

    per_token: int
    per_attended: int
    per_response_token: int

    def forward(self, pair: Lengths) -> int:
        """Return the cost of a pair whose prompt is computed once and whose responses alone are projected."""
        shared = pair.prompt + pair.chosen + pair.rejected
        attended = _causal(pair.prompt) + sum(
            response * pair.prompt + _causal(response) for response in (pair.chosen, pair.rejected)
        )
        responses = pair.chosen + pair.rejected
        return self.per_token * shared + self.per_attended * attended + self.per_response_token * responses


def _causal(tokens: int) -> int:
    """Return how many pairs of positions a causal sequence attends to within itself."""
    return tokens * (tokens + 1) // 2


def arithmetic(model: nn.Module) -> Arithmetic:
    """Read off a causal language model's modules what a forward pass costs; weights are not needed.

    Raises:
        NotCounted: It has weights beyond linear layers and embeddings (mixtures of experts, convolutions), or no
            attention that is recognised.
    """
    model_: Any = model
    head = model_.get_output_embeddings()
    weights = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weights += 0 if module is head else module.weight.numel()
        elif not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            raise NotCounted(f"`{name}` ({type(module).__name__}) is neither a linear layer nor an embedding")
    layers = sum(type(module).__name__.endswith("Attention") for module in model.modules())
    if not layers:
        raise NotCounted("the model has no module whose class is named as attention")
    config = model_.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Arithmetic(2 * weights, 4 * width * layers, 2 * head.weight.numel())


def adapter_arithmetic(model: nn.Module, rank: int) -> Arithmetic:
    """Return what matrices of a rank beside every linear layer but the vocabulary projection add to a forward pass."""
    head = cast(Any, model).get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    return Arithmetic(2 * rank * sum(sum(module.weight.shape) for module in linear), 0, 0)


def read_rows(file: Path) -> list[Row]:
    """Read a JSON list or JSON lines; keep the fields of a pair."""
    text = file.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except json.JSONDecodeError as error:
        sys.exit(f"error: {file.name} cannot be read: {error}")
    return [{field: row[field] for field in FIELDS if row.get(field)} for row in rows]


def long_rows(rows: Sequence[Row], count: Callable[[str], int]) -> Iterator[Row]:
    """Join short pairs into long ones without end: a list of instructions, two lists of answers.

    Args:
        rows: The short pairs.
        count: Returns the number of tokens of a text.
    """
    start = 0
    while True:
        yield {
            field: _joined([row[field] for row in rows[start:] + rows[:start]], tokens, count)
            for field, tokens in LONG_TOKENS.items()
        }
        start = (start + LONG_STRIDE) % len(rows)


def _joined(texts: Sequence[str], tokens: int, count: Callable[[str], int]) -> str:
    """Number texts and join them for as long as they have no more than so many tokens."""
    joined = f"1. {texts[0]}"
    for number, text in enumerate(texts[1:], 2):
        longer = f"{joined}\n{number}. {text}"
        if count(longer) > tokens:
            break
        joined = longer
    return joined


def workload_rows(source: Path, num_pairs: int, tokenizer: Any, *, join: bool) -> list[Row]:
    """Return the first pairs of a file, or as many long ones made from all of its pairs."""
    rows = read_rows(source)
    if join:
        made = long_rows(rows, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return [next(made) for _ in range(num_pairs)]
    if len(rows) < num_pairs:
        sys.exit(f"error: {source.name} has {len(rows)} pairs, but {num_pairs} are asked for")
    return rows[:num_pairs]


def token_lengths(rows: Sequence[Row], tokenizer: Any) -> list[Lengths]:
    """Tokenize pairs as the program does and return how long they are; none may be dropped or cut."""
    tokenize = PairTokenizer(tokenizer, template=None, max_length=MAX_LENGTH, on_too_long="error")
    try:
        results = tokenize(
            [FORMATS["instruction"].read(row, f"pair {number}", "extremes")[0] for number, row in enumerate(rows, 1)]
        )
    except BadRow as bad:
        sys.exit(f"error: a pair is of no use: {bad}")
    for number, result in enumerate(results, 1):
        if isinstance(result, BadRow):
            sys.exit(f"error: pair {number} is of no use: {result}")
    pairs = [result.pair for result in results if not isinstance(result, BadRow)]
    return [Lengths(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]


def model_folder(model: str, folder: Path) -> str:
    """Return a model's folder or Hub id; a .gguf file becomes a folder first, which every trainer can read."""
    if Path(model).suffix.lower() != ".gguf":
        return model
    target = folder / "model"
    tokenizer = load_tokenizer(model)
    with saved_model(target, load_policy(model), tokenizer, "converting the model"):
        return str(target)


def random_model(shape: str, tokenizer: str, folder: Path) -> str:
    """Write a model of one of `SHAPES` with random weights, made where they are made fastest; return its folder."""
    target, on_gpu = folder / "model", torch.cuda.is_available()
    reader = load_tokenizer(tokenizer)
    ends = {"bos_token_id": reader.bos_token_id, "eos_token_id": reader.eos_token_id}
    config = LlamaConfig(**SHAPES[shape], **ends, max_position_embeddings=8192)
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
    target.mkdir()
    write_model(target, model.cpu(), reader)
    return str(target)


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Make the model a folder, write the pairs of each workload and count what they cost.

    Args:
        request: `model`, or the tokenizer of a model of random weights; `shape` of that, or None; `folder` to write to,
            `rank` of the adapter or 0, and `workloads`: name → `file`, `pairs`, `join`.

    Returns:
        `model`, a folder; `threads`, how many there are; `not_counted`, why the arithmetic is not known, or None; and
        `workloads`: name → `file`, the sums of tokens, `forward_flops` and of the adapter `adapter_flops`.
    """
    folder = Path(request["folder"])
    named, shape = request["model"], request["shape"]
    model = random_model(shape, named, folder) if shape else model_folder(named, folder)
    tokenizer = load_tokenizer(model)
    costs, not_counted = None, None
    empty = empty_policy(model)
    added = adapter_arithmetic(empty, request["rank"])
    try:
        costs = arithmetic(empty)
    except NotCounted as reason:
        not_counted = str(reason)
    workloads = {}
    for name, wanted in request["workloads"].items():
        rows = workload_rows(Path(wanted["file"]), wanted["pairs"], tokenizer, join=wanted["join"])
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lengths = token_lengths(rows, tokenizer)
        workloads[name] = {
            "file": str(file),
            "prompt_tokens": sum(pair.prompt for pair in lengths),
            "chosen_tokens": sum(pair.chosen for pair in lengths),
            "rejected_tokens": sum(pair.rejected for pair in lengths),
            "forward_flops": sum(costs.forward(pair) for pair in lengths) if costs else None,
            "adapter_flops": sum(added.forward(pair) for pair in lengths),
        }
    answer = {"model": model, "threads": torch.get_num_threads(), "not_counted": not_counted, "workloads": workloads}
    return {**answer, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def main() -> None:
    """Do what the first argument names and print the answer."""
    try:
        answer = prepare(json.loads(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error.what}; hint: {error.hint}")
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
