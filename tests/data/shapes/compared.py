from tests.data.shapes import Case, Expected, assistant, pair, user

RIVER = "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n"
BETTER = Expected(
    pair([user("A river?")], [assistant("The Elbe.")], [assistant("No.")]),
    RIVER,
    "⟦The Elbe.<|im_end|>\n⟧",
    "⟦No.<|im_end|>\n⟧",
)


def texts(a, b, **verdict):
    return {"prompt": "A river?", "response_a": a, "response_b": b, **verdict}


def numbered(first, good, bad, winner):
    """Spell a row whose answers have numbers from the first on, the good one by the winner's number."""
    answers = {f"response_{n}": good if n == int(winner) else bad for n in (first, first + 1)}
    return {"prompt": "A river?", **answers, "winner": winner}


ASKED = {"role": "user", "content": "A river?"}
CASES = [
    Case(
        "the winner by its letter, however it is called",
        [texts("The Elbe.", "No.", winner=name) for name in ("a", "A", "model_a", "Response A", "[[A]]", "first")]
        + [texts("No.", "The Elbe.", winner=name) for name in ("b", "B", "assistant b", "answer_b wins")],
        [BETTER] * 10,
    ),
    Case(
        "whether the first is better",
        [texts("The Elbe.", "No.", label=yes) for yes in (True, 1, 1.0, "true")]
        + [texts("No.", "The Elbe.", label=no) for no in (False, 0, 0.0, "False")],
        [BETTER] * 8,
    ),
    Case(
        "the winner by its number, counted from 1 or from 0",
        [numbered(first, "The Elbe.", "No.", winner) for first, winner in ((1, 1), (1, 2), (0, 0), (0, 1), (1, "2"))],
        [BETTER] * 5,
    ),
    Case(
        "the winner by the name of its model",
        [texts("No.", "The Elbe.", model_a="tiny-7b", model_b="big-a", winner="big-a")],
        [BETTER],
    ),
    Case(
        "whole conversations",
        [
            {
                "winner": "model_b",
                "response_a": [ASKED, {"role": "assistant", "content": "No."}],
                "response_b": [ASKED, {"role": "assistant", "content": "The Elbe."}],
            }
        ],
        [BETTER],
    ),
]
