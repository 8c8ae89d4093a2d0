"""Write the demo preference pairs: direct one-sentence answers against the same answers with filler.

The content is hand-written in demo_content.py; this script words the prompts, wraps the rejected
answers in filler and checks what it promises. It is deterministic: the same bytes every time.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo_content import (
    BRIDGES,
    CLOSED_FAMILIES,
    CLOSERS,
    ESSAY_CLOSERS,
    OPEN_FAMILIES,
    PLEASANTRIES,
    RESTATEMENTS,
    Family,
)

OUTPUT = Path(__file__).resolve().parents[1] / "configs" / "demo" / "pairs.jsonl"
SEED = 20240229
MIN_PAIRS = 480
MIN_FAMILIES = 20
# English runs to about five tokens per four words, so this keeps rejected answers at 25 to 45 tokens.
REJECTED_WORDS = range(22, 36)
# The order in which the parts of a rejected answer come; A stands for the answer itself.
CLOSED_SHAPES = ("OA", "RA", "OBA", "RBA", "ORA", "OAC", "RAC", "OBAC")
# Open answers also ramble on after the point, which is where a small model loses itself most.
OPEN_SHAPES = (
    "OAE",
    "RAE",
    "SAE",
    "SAC",
    "OAC",
    "SBA",
    "RBA",
    "OSA",
    "AEC",
    "AEC",
    "AEE",
    "AEE",
    "AEE",
)
# First words that may lose their capital when a bridge leads into the sentence.
LOWERABLE = {"A", "An", "The", "Their", "Its", "There", "Most"}

Pair = dict[str, str]


class Picker:
    """Draw from pools so that every entry is used about equally often."""

    def __init__(self, rng: random.Random) -> None:
        """Start with nothing drawn yet."""
        self.rng = rng
        self.uses: Counter[str] = Counter()

    def pick(self, pool: Sequence[str]) -> str:
        """Return one of the least used entries of a pool and count the use."""
        fewest = min(self.uses[entry] for entry in pool)
        choice = self.rng.choice([entry for entry in pool if self.uses[entry] == fewest])
        self.uses[choice] += 1
        return choice

    def give_back(self, entries: Sequence[str]) -> None:
        """Uncount draws that were not used after all."""
        self.uses.subtract(entries)


def parse_rows(table: str) -> Iterator[list[str]]:
    """Yield the columns of every row of a hand-written table."""
    for line in table.strip().splitlines():
        yield [column.strip() for column in line.split(" | ")]


def capitalise(text: str) -> str:
    """Return a text with its first letter as a capital and the rest as it is."""
    return text[:1].upper() + text[1:]


def join_after_bridge(bridge: str, answer: str) -> str:
    """Continue a bridge into the answer, without a stray capital after a comma."""
    if bridge.endswith(","):
        answer = answer[0].lower() + answer[1:]
    return f"{bridge} {answer}"


def ramble(picker: Picker, family: Family, columns: list[str], answer: str, seen: set[str]) -> str:
    """Wrap an answer in filler that nobody has been given before."""
    topic = family.topic.format(*columns)
    can_lower = answer.split()[0] in LOWERABLE
    bridges = [bridge for bridge in BRIDGES if can_lower or not bridge.endswith(",")]
    pools: dict[str, Sequence[str]] = {
        "O": PLEASANTRIES,
        "R": RESTATEMENTS,
        "S": family.openers,
        "B": bridges,
        "C": CLOSERS,
        "E": ESSAY_CLOSERS,
    }
    shapes = OPEN_SHAPES if family.open_ended else CLOSED_SHAPES
    unused: list[str] = []
    for _ in range(1000):
        shape = picker.rng.choice(shapes)
        parts = {position: picker.pick(pools[part]) for position, part in enumerate(shape) if part != "A"}
        filler = " ".join(parts.values())
        texts: list[str] = []
        for position, part in enumerate(shape):
            if part == "A":
                bridged = shape[position - 1] == "B" if position else False
                texts.append(join_after_bridge(texts.pop(), answer) if bridged else answer)
            else:
                texts.append(parts[position].format(*columns, topic=topic, Topic=capitalise(topic)))
        text = " ".join(texts)
        if filler not in seen and len(text.split()) in REJECTED_WORDS:
            seen.add(filler)
            picker.give_back(unused)
            return text
        # Given back only at the end, or the same unfitting entries would be drawn again and again.
        unused.extend(parts.values())
    raise AssertionError(f"no filler fits: {answer}")


def make_pairs() -> list[Pair]:
    """Build all pairs, with the families mixed by a seeded shuffle."""
    rng = random.Random(SEED)
    picker = Picker(rng)
    seen: set[str] = set()
    pairs: list[Pair] = []
    for family in OPEN_FAMILIES + CLOSED_FAMILIES:
        for number, columns in enumerate(parse_rows(family.rows)):
            wording = family.wordings[number % len(family.wordings)]
            answer = capitalise(family.answers[number % len(family.answers)].format(*columns))
            pair = {"instruction": capitalise(wording.format(*columns))}
            if family.input:
                pair["input"] = family.input.format(*columns)
            pair["chosen"] = answer
            pair["rejected"] = ramble(picker, family, columns, answer, seen)
            pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def check_pairs(pairs: list[Pair]) -> None:
    """Assert everything that the demo promises about its pairs."""
    families = OPEN_FAMILIES + CLOSED_FAMILIES
    open_rows = sum(len(list(parse_rows(family.rows))) for family in OPEN_FAMILIES)
    assert len(pairs) >= MIN_PAIRS, f"only {len(pairs)} pairs"
    assert len({family.name for family in families}) == len(families) >= MIN_FAMILIES, "families"
    assert 2 * open_rows >= len(pairs), "open prompts are in the minority"
    prompts = Counter((pair["instruction"].lower(), pair.get("input", "").lower()) for pair in pairs)
    assert max(prompts.values()) == 1, f"repeated prompt: {prompts.most_common(1)}"
    assert len({pair["rejected"] for pair in pairs}) == len(pairs), "repeated rejected answer"
    for pair in pairs:
        chosen, rejected = pair["chosen"], pair["rejected"]
        assert all(text and text == " ".join(text.split()) for text in pair.values()), f"spacing: {pair}"
        assert all(text.isascii() and not set(text) & set("{}|\\") for text in pair.values()), f"text: {pair}"
        assert chosen != rejected and len(chosen) < len(rejected), f"chosen is not shorter: {pair}"
        # Only directness may differ, so the rejected answer holds the chosen one word for word.
        assert chosen[1:] in rejected, f"different content: {pair}"
        assert chosen[-1] in ".!?" and rejected[-1] in '.!?"', f"unfinished sentence: {pair}"
        assert len(rejected.split()) in REJECTED_WORDS, f"length: {pair}"


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=f"Write the demo preference pairs ({OUTPUT.name}).")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 when the checked-in file is not what this makes",
    )
    check_only = parser.parse_args().check
    pairs = make_pairs()
    check_pairs(pairs)
    content = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs).encode("utf-8")
    if check_only:
        if OUTPUT.is_file() and OUTPUT.read_bytes() == content:
            print(f"{OUTPUT.name} is up to date ({len(pairs)} pairs).")
            return 0
        print(f"error: {OUTPUT} is not what this script makes; hint: run it without --check", file=sys.stderr)
        return 1
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_bytes(content)
    print(f"Wrote {len(pairs)} pairs to {OUTPUT}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
