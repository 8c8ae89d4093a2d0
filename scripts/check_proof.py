"""Try the proof of the packed layout in bfloat16 on the real model: on exact layouts, and with faults planted.

For each of some seeds two short pairs of the demo data are proved as before step 1. Prints what was found by fault, and
how far rounding took the packed layout from the padded one in units of what it explains.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from dpo_cli.data.pairs.sources import Source
from dpo_cli.data.prepared.folder import PreparedPairs, Reading
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.records import TokenizedPair
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.modeling.attention import pieces as attention
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.layouts import PACKED
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.proof import Proof, prove
from dpo_cli.modeling.scorer import Scorer

ROOT = Path(__file__).parent.parent
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO = ROOT / "configs" / "demo" / "pairs.jsonl"
BFLOAT16 = PRECISIONS["bfloat16"]
WINDOW = 24
"""Shorter than every pair, so that windows matter."""

_SHORTEST = 60
"""Of how many pairs two are drawn."""


@contextlib.contextmanager
def scale_off() -> Iterator[None]:
    """Multiply attention's products by 1 % too much."""
    attend = attention._attend

    def louder(query: Any, key: Any, value: Any, mask: Any, scaling: float | None, softcap: float | None) -> Any:
        return attend(query, key, value, mask, 1.01 * (scaling or query.shape[-1] ** -0.5), softcap)

    with mock.patch.object(attention, "_attend", louder):
        yield


@contextlib.contextmanager
def window_off() -> Iterator[None]:
    """Let layers with a window look back one token too far."""

    class Longer(attention.PieceMask):
        def __init__(self, stretches: Any, window: int | None) -> None:
            super().__init__(stretches, window and window + 1)

    with mock.patch.object(attention, "PieceMask", Longer):
        yield


@contextlib.contextmanager
def token_leaked() -> Iterator[None]:
    """Let one token of each row see the one behind it, where a row begins."""
    attend = attention._attend

    def leaky(query: Any, key: Any, value: Any, mask: Any, scaling: float | None, softcap: float | None) -> Any:
        if query.shape[2] != key.shape[2] or query.shape[2] < 3:
            return attend(query, key, value, mask, scaling, softcap)

        class Leaky:
            def of(self, *shape: Any) -> Any:
                added = mask.of(*shape).clone()
                added[-2, -1] = 0
                return added

        return attend(query, key, value, Leaky(), scaling, softcap)

    with mock.patch.object(attention, "_attend", leaky):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "none": contextlib.nullcontext,
    "window off by one": window_off,
    "one leaked token": token_leaked,
    "scale off by 1 %": scale_off,
}
"""What is planted, by name."""


def with_window(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """Return a Llama as a Mistral of the same weights that looks back at most so many tokens."""
    settings = {name: of for name, of in model.config.to_dict().items() if name not in ("model_type", "architectures")}
    with torch.device("meta"):
        windowed = MistralForCausalLM(MistralConfig(**{**settings, "sliding_window": window}))
    windowed.load_state_dict(model.state_dict(), assign=True)
    windowed.tie_weights()
    windowed.model.rotary_emb = model.model.rotary_emb
    return windowed.eval()


def demo_pairs(folder: Path) -> PreparedPairs:
    """Return the demo's pairs, tokenized for the real model."""
    tokenize = PairTokenizer(load_tokenizer(str(GGUF)), template=None, max_length=1000, on_too_long="drop")
    return prepare([Source(path=str(DEMO))], Reading("auto", "error", "extremes"), tokenize, folder)


def drawn(pairs: PreparedPairs, seed: int) -> list[TokenizedPair]:
    """Return two of the shortest pairs."""
    shortest = pairs.sizes.longest.argsort(kind="stable")[:_SHORTEST]
    return [pairs[int(index)] for index in random.Random(seed).sample(list(shortest), 2)]


def proved(model: PreTrainedModel, pairs: Sequence[TokenizedPair], fault: str, *, trained: bool = True) -> Proof:
    """Prove the packed layout with a fault planted; give the model its own attention back."""
    own = model.config._attn_implementation
    try:
        with FAULTS[fault]():
            return prove(Scorer(model), PACKED, pairs, BFLOAT16, trained=trained)
    finally:
        model.set_attn_implementation(own)


def main() -> int:
    """Print a line for each seed and fault, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--held", choices=["float32", "bfloat16"], default="float32", help="what weights are held in")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        pairs, model = demo_pairs(Path(folder) / "pairs"), load_policy(str(GGUF)).eval()
        model = model.to(PRECISIONS[options.held].dtype)
        for fault in options.faults:
            asked = with_window(model, WINDOW) if fault == "window off by one" else model
            found, ratios, started = 0, [], time.monotonic()
            for seed in range(options.seeds):
                # The log-probabilities show each fault by themselves.
                proof = proved(asked, drawn(pairs, seed), fault, trained=fault == "none")
                failure = proof.fails(BFLOAT16)
                found += bool(failure)
                if proof.rounding:
                    logps, logps_noise, gradient, gradient_noise = proof.rounding
                    ratios.append((logps / logps_noise, gradient / (gradient_noise or 1)))
                print(f"{fault}, seed {seed}: {failure or 'exact'}; {proof}", flush=True)
            wrong += found if fault == "none" else options.seeds - found
            print(f"{fault}: {found} of {options.seeds} fail, {time.monotonic() - started:.0f} s", flush=True)
            if ratios:
                largest = ", ".join(
                    f"{name} {max(of):.2f}"
                    for name, of in zip(("log-probabilities", "gradient"), zip(*ratios, strict=True), strict=True)
                )
                print(f"{fault}: at most so many times what rounding explains: {largest}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
