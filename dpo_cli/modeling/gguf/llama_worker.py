"""The process in which llama.cpp reads a GGUF file: a crash of it ends no export, and nothing of its memory stays.

A line on standard input is a request, one on standard output the answer; both are JSON. What llama.cpp prints goes to
standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

_FLOAT32 = 0
"""GGML's number for it."""

_MOST_AT_ONCE = 512
"""The most tokens of a forward pass."""


class Reader:
    """A file that llama.cpp has opened, with settings that round as little as it can: float32 keys and values.

    Args:
        file: The path of the file.
        positions: The most tokens of a sequence.
        threads: How many compute.
    """

    def __init__(self, file: str, positions: int, threads: int) -> None:
        self._model = llama_cpp.Llama(
            file,
            n_ctx=positions,
            n_batch=min(positions, _MOST_AT_ONCE),
            n_ubatch=min(positions, _MOST_AT_ONCE),
            n_threads=threads,
            n_threads_batch=threads,
            type_k=_FLOAT32,
            type_v=_FLOAT32,
            flash_attn=False,
            n_gpu_layers=0,
            no_perf=True,
        )
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model.model)
        self._batch = llama_cpp.llama_batch_init(_MOST_AT_ONCE, 0, 1)

    def logps(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a response, in nats."""
        tokens = [*prompt, *response[:-1]]
        found = []
        targets = iter(response)
        for logits in self._logits(tokens, len(prompt) - 1):
            chosen = [next(targets) for _ in logits]
            found.append(log_softmax(logits)[np.arange(len(chosen)), chosen])
        return np.concatenate(found).tolist() if found else []

    def greedy(self, prompt: Sequence[int], stops: Collection[int], max_new_tokens: int) -> tuple[list[int], bool]:
        """Return the tokens of the likeliest answer, and whether a stop token ended it."""
        answer: list[int] = []
        tokens, begin = list(prompt), 0
        while len(answer) < max_new_tokens:
            *_, last = self._logits(tokens, len(tokens) - 1, begin)
            begin += len(tokens)
            tokens = [int(last[-1].argmax())]
            if tokens[0] in stops:
                return answer, True
            answer += tokens
        return answer, False

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, special ones by their names, none added."""
        found: list[int] = self._model.tokenize(text.encode(), add_bos=False, special=True)
        return found

    def ends(self) -> list[int]:
        """Return the tokens at which llama.cpp ends an answer."""
        ends = llama_cpp.llama_vocab_is_eog
        return [token for token in range(self._model.n_vocab()) if ends(self._vocabulary, token)]

    def begins(self) -> int | None:
        """Return the token that llama.cpp puts before a prompt that is not a chat, if it does."""
        adds = llama_cpp.llama_vocab_get_add_bos(self._vocabulary)
        return self._model.token_bos() if adds else None

    def _logits(self, tokens: Sequence[int], wanted: int, begin: int = 0) -> Iterator[NDArray[np.float32]]:
        """Yield, pass by pass, the logits at the places of tokens from the place `wanted` on.

        Args:
            tokens: They follow those of the calls before; where `begin` is 0, they are the first of a sequence.
            wanted: A place in `tokens`.
            begin: How many tokens there were before.
        """
        if not begin:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._model.ctx), True)
        batch = self._batch
        for first in range(0, len(tokens), _MOST_AT_ONCE):
            some = tokens[first : first + _MOST_AT_ONCE]
            batch.n_tokens = len(some)
            for row, token in enumerate(some):
                batch.token[row], batch.pos[row] = token, begin + first + row
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
                batch.logits[row] = first + row >= wanted
            if status := llama_cpp.llama_decode(self._model.ctx, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            if num_rows := sum(first + row >= wanted for row in range(len(some))):
                logits = llama_cpp.llama_get_logits(self._model.ctx)
                yield np.ctypeslib.as_array(logits, (num_rows, self._model.n_vocab()))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-probabilities, computed in float64; `[N, V]` both."""
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    found: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    return found


def main() -> None:
    """Open the file that the first request names, and answer those that follow until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The process that started this one answers interrupts.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        reader: Reader | None = None
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                if reader is None:
                    reader, found = Reader(*arguments), None
                else:
                    found = getattr(reader, name)(*arguments)
                answer: dict[str, Any] = {"found": found}
            except (RuntimeError, ValueError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
