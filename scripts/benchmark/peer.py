"""Train on given pairs with TRL's DPOTrainer; the benchmark starts this as a process of its own.

    python peer.py MODEL PAIRS PAIRS_PER_STEP EPOCHS OUTPUT_FOLDER

Lines on standard error say when training begins and ends; the last line of standard output is the losses as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class InOrder(DPOTrainer):
    """Take the pairs in their order instead of shuffled, as the other side does."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def conversations(file: Path) -> Dataset:
    """Read instruction / input / chosen / rejected lines as TRL's conversational preference rows."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))}
                ],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    )


def mark(text: str) -> None:
    """Write a line of its own to standard error, whatever a progress bar has left there."""
    sys.stderr.write(f"\nbenchmark: {text}\n")
    sys.stderr.flush()


def main() -> None:
    """Load, train, save; TRL's defaults but for what makes the work the same."""
    model, pairs, pairs_per_step, epochs, output = sys.argv[1:]
    settings = DPOConfig(
        output_dir=output,
        per_device_train_batch_size=int(pairs_per_step),
        num_train_epochs=int(epochs),
        learning_rate=5e-6,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=1024,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=conversations(Path(pairs)),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    mark("training begins")
    trainer.train()
    mark("training ended")
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sys.stdout.write("\n" + json.dumps(losses) + "\n")


if __name__ == "__main__":
    main()
