from tests.data.shapes import Case, Expected, assistant, pair, system, user

CASES = [
    Case(
        "one turn",
        [
            {
                "prompt": "What is the plural of octopus?",
                "prompt_id": "a1f3",
                "chosen": [
                    {"role": "user", "content": "What is the plural of octopus?"},
                    {"role": "assistant", "content": "Octopuses; octopodes is the learned one."},
                ],
                "rejected": [
                    {"role": "user", "content": "What is the plural of octopus?"},
                    {"role": "assistant", "content": "Octopi is the only correct plural."},
                ],
                "messages": [{"role": "user", "content": "What is the plural of octopus?"}],
                "score_chosen": 8.5,
                "source": "sharegpt",
            }
        ],
        [
            Expected(
                pair(
                    [user("What is the plural of octopus?")],
                    [assistant("Octopuses; octopodes is the learned one.")],
                    [assistant("Octopi is the only correct plural.")],
                    source="sharegpt",
                ),
                "<|im_start|>user\nWhat is the plural of octopus?<|im_end|>\n<|im_start|>assistant\n",
                "⟦Octopuses; octopodes is the learned one.<|im_end|>\n⟧",
                "⟦Octopi is the only correct plural.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "a system's turn before it, several turns after it, in German",
        [
            {
                "prompt": "Ich suche ein Buch.",
                "chosen": [
                    {"role": "system", "content": "Du arbeitest in einer Bücherei."},
                    {"role": "user", "content": "Ich suche ein Buch."},
                    {"role": "assistant", "content": "Welches denn?"},
                    {"role": "user", "content": "Den Zauberberg."},
                    {"role": "assistant", "content": "Erster Stock, bei M."},
                ],
                "rejected": [
                    {"role": "system", "content": "Du arbeitest in einer Bücherei."},
                    {"role": "user", "content": "Ich suche ein Buch."},
                    {"role": "assistant", "content": "Welches denn?"},
                    {"role": "user", "content": "Den Zauberberg."},
                    {"role": "assistant", "content": "Suchen Sie selbst."},
                ],
            }
        ],
        [
            Expected(
                pair(
                    [
                        system("Du arbeitest in einer Bücherei."),
                        user("Ich suche ein Buch."),
                        assistant("Welches denn?"),
                        user("Den Zauberberg."),
                    ],
                    [assistant("Erster Stock, bei M.")],
                    [assistant("Suchen Sie selbst.")],
                ),
                "<|im_start|>system\nDu arbeitest in einer Bücherei.<|im_end|>\n"
                "<|im_start|>user\nIch suche ein Buch.<|im_end|>\n<|im_start|>assistant\nWelches denn?<|im_end|>\n"
                "<|im_start|>user\nDen Zauberberg.<|im_end|>\n<|im_start|>assistant\n",
                "⟦Erster Stock, bei M.<|im_end|>\n⟧",
                "⟦Suchen Sie selbst.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "a text and two messages",
        [
            {
                "prompt": "A river?",
                "chosen": {"role": "assistant", "content": "The Elbe."},
                "rejected": {"role": "assistant", "content": "No."},
            }
        ],
        [
            Expected(
                pair([user("A river?")], [assistant("The Elbe.")], [assistant("No.")]),
                "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n",
                "⟦The Elbe.<|im_end|>\n⟧",
                "⟦No.<|im_end|>\n⟧",
            )
        ],
    ),
]
