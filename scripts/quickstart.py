"""The quickstart: prepare, train and evaluate, then show what changed.

Everything is done by the commands that a user would give; this script only gives them one after the other
and sets the results side by side. Run it with `make quickstart`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_cli.config import load_config

CONFIG = "configs/quickstart.yaml"
RUN = Path("runs/quickstart")
NUM_ANSWERS = 3
console = Console(highlight=False)


def dpo(*arguments: str) -> None:
    """Run one command of the program, saying which; stop where it fails."""
    console.print(f"\n[bold]$ dpo {' '.join(arguments)}[/bold]")
    started = time.monotonic()
    status = subprocess.run([sys.executable, "-m", "dpo_cli", *arguments], check=False).returncode
    if status:
        sys.exit(status)
    console.print(f"[dim]({time.monotonic() - started:.0f} s)[/dim]")


def held_out_prompts() -> list[tuple[str, str]]:
    """Return some held-out prompts, as asked and as rendered for the model."""
    from dpo_cli.pipeline.pairs import load_tokenizer, run_data
    from dpo_cli.reporting.console import Console as Quiet

    config = load_config(Path(CONFIG))
    quiet = Quiet(prints=False)
    tokenizer, tokenize = load_tokenizer(config, quiet)
    data = run_data(config, tokenize, quiet)
    rows = Path("configs/demo/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = []
    for index in data.held_out:
        pair = data.pairs[int(index)]
        row = json.loads(rows[int(pair.origin.rpartition(":")[2]) - 1])
        prompts.append((row["instruction"], tokenizer.decode(pair.prompt.tolist()), bool(row.get("input"))))
    # Questions without an input make answers that are read at a glance.
    return [(asked, rendered) for asked, rendered, has_input in prompts if not has_input]


def answers(model: str, prompts: list[str]) -> list[str]:
    """Return a model's greedy answers."""
    import torch

    from dpo_cli.modeling.folders.loading import load_policy
    from dpo_cli.modeling.folders.tokenizers import load_tokenizer

    tokenizer, policy = load_tokenizer(model), load_policy(model)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = policy.generate(**ids, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def before_training() -> dict[str, Any]:
    """Return the held-out figures of the model before step 1, as the run logged them."""
    rows = map(json.loads, (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return next(row for row in rows if (row["split"], row["step"]) == ("eval", 0))


def show(before: dict[str, Any], after: dict[str, Any], model: str) -> None:
    """Print the figures and the answers side by side."""
    from dpo_cli.reporting.tables import figures_table

    console.print("\n[bold]What changed, on pairs that were not trained on[/bold]\n")
    console.print(figures_table({"before": before, "after": after}))
    prompts = held_out_prompts()[2::4][:NUM_ANSWERS]
    table = Table(title="\nGreedy answers to held-out prompts", show_lines=True, title_justify="left")
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    rendered = [text for _, text in prompts]
    for (asked, _), old, new in zip(
        prompts, answers(model, rendered), answers(str(RUN / "final"), rendered), strict=True
    ):
        table.add_row(asked, old, new)
    console.print(table)


def main() -> None:
    """Walk the whole road once."""
    started = time.monotonic()
    console.print("Training a 135M model to answer directly instead of rambling: about 5 minutes on two CPU cores.")
    model = load_config(Path(CONFIG)).model.name
    dpo("prepare-data", "--config", CONFIG)
    dpo("train", "--config", CONFIG, *(["--overwrite"] if RUN.exists() else []))
    with tempfile.TemporaryDirectory() as folder:
        after = Path(folder) / "after.json"
        dpo("eval", "--config", CONFIG, "--json", str(after))
        show(before_training(), json.loads(after.read_text()), model)
    console.print(f"\nThe trained model is in {RUN / 'final'}; metrics in {RUN / 'metrics.jsonl'}.")
    console.print(f"All of it took {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
