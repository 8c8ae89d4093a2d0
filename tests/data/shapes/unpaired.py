from tests.data.shapes import Case, Expected, assistant, pair, system, user

CASES = [
    Case(
        "good and bad answers of two prompts, apart in the file; one more is bad than good",
        [
            {"prompt": "What is 7 × 8?", "completion": "54", "label": False},
            {"prompt": "Spell “rhythm”.", "completion": "r-h-y-t-h-m", "label": True, "weight": 3, "source": "a"},
            {"prompt": "What is 7 × 8?", "completion": "56", "label": True},
            {"prompt": "What is 7 × 8?", "completion": "Who knows?", "label": False},
            {"prompt": "Spell “rhythm”.", "completion": "r-y-t-h-m", "label": 0, "source": "b"},
        ],
        [
            Expected(
                pair([user("What is 7 × 8?")], [assistant("56")], [assistant("54")]),
                "<|im_start|>user\nWhat is 7 × 8?<|im_end|>\n<|im_start|>assistant\n",
                "⟦56<|im_end|>\n⟧",
                "⟦54<|im_end|>\n⟧",
            ),
            Expected(
                pair(
                    [user("Spell “rhythm”.")],
                    [assistant("r-h-y-t-h-m")],
                    [assistant("r-y-t-h-m")],
                    weight=2.0,
                    source="a",
                ),
                "<|im_start|>user\nSpell “rhythm”.<|im_end|>\n<|im_start|>assistant\n",
                "⟦r-h-y-t-h-m<|im_end|>\n⟧",
                "⟦r-y-t-h-m<|im_end|>\n⟧",
            ),
        ],
    ),
    Case(
        "message lists; a prompt as text and as a list is the same prompt, with another system's turn it is not",
        [
            {
                "prompt": [{"role": "user", "content": "Скажи «да»."}],
                "completion": [{"role": "assistant", "content": "Да."}],
                "label": 1,
            },
            {"prompt": "Скажи «да».", "completion": "Как скажешь.", "label": 0, "system": "Будь краток."},
            {"prompt": "Скажи «да».", "completion": "Нет.", "label": False},
            {
                "prompt": [{"role": "system", "content": "Будь краток."}, {"role": "user", "content": "Скажи «да»."}],
                "completion": [{"role": "assistant", "content": "Да!"}],
                "label": True,
            },
        ],
        [
            Expected(
                pair([user("Скажи «да».")], [assistant("Да.")], [assistant("Нет.")]),
                "<|im_start|>user\nСкажи «да».<|im_end|>\n<|im_start|>assistant\n",
                "⟦Да.<|im_end|>\n⟧",
                "⟦Нет.<|im_end|>\n⟧",
            ),
            Expected(
                pair([system("Будь краток."), user("Скажи «да».")], [assistant("Да!")], [assistant("Как скажешь.")]),
                "<|im_start|>system\nБудь краток.<|im_end|>\n<|im_start|>user\nСкажи «да».<|im_end|>\n"
                "<|im_start|>assistant\n",
                "⟦Да!<|im_end|>\n⟧",
                "⟦Как скажешь.<|im_end|>\n⟧",
            ),
        ],
    ),
]
