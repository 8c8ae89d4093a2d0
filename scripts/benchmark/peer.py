"""Train on given pairs with TRL's DPOTrainer; the benchmark starts this as a process of its own.

    python peer.py MODEL PAIRS PAIRS_PER_STEP EPOCHS LEARNING_RATE SEED OUTPUT_FOLDER [--adapter JSON]

Lines on standard error say when training begins and ends; the last line of standard output is the losses as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from benchmark.metered import note_peak


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


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("model")
    add("pairs", type=Path)
    add("pairs_per_step", type=int)
    add("epochs", type=int)
    add("learning_rate", type=float)
    add("seed", type=int)
    add("output")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--peak", type=Path, help="where to write the most bytes that were taken of a GPU")
    add("--recomputed", action="store_true", help="gradient checkpointing")
    add("--precomputed", action="store_true", help="ask the reference before step 1")
    add("--adapter", type=json.loads, help="rank and alpha of LoRA on every linear layer, and dora or rslora")
    return parser.parse_args()


def lora(settings: dict[str, Any]) -> LoraConfig:
    """Return PEFT's settings as TRL's documentation writes them."""
    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=settings.get("dora", False),
        use_rslora=settings.get("rslora", False),
        task_type="CAUSAL_LM",
    )


def main() -> None:
    """Load, train, save; TRL's defaults but for what makes the work the same."""
    options = read_options()
    settings = DPOConfig(
        output_dir=options.output,
        per_device_train_batch_size=options.pairs_per_step,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        seed=options.seed,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=1024,
        use_cpu=options.device == "cpu",
        bf16=options.device == "cuda",
        gradient_checkpointing=options.recomputed,
        precompute_ref_log_probs=options.precomputed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    # All weights train in float32 under autocast on both sides; a base that stays as it is, is held as it is computed.
    dtype = torch.bfloat16 if options.device == "cuda" and options.adapter else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    # An adapter's first weights are drawn next: the same as those of the other side, or the losses would tell.
    set_seed(options.seed)
    trainer = InOrder(
        model=model,
        args=settings,
        train_dataset=conversations(options.pairs),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora(options.adapter) if options.adapter else None,
    )
    mark("training begins")
    trainer.train()
    mark("training ended")
    if options.peak:
        note_peak(options.peak)
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sys.stdout.write("\n" + json.dumps(losses) + "\n")


if __name__ == "__main__":
    main()
