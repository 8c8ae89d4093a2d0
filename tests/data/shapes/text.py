from tests.data.shapes import Case, Expected, assistant, pair, system, user

CASES = [
    Case(
        "a question and two answers",
        [
            {
                "prompt": "My bread is dense. What went wrong?",
                "chosen": "Most likely it rose too little. Give it an hour more in a warm place.",
                "rejected": "Bread is a staple food made of flour and water.",
            }
        ],
        [
            Expected(
                pair(
                    [user("My bread is dense. What went wrong?")],
                    [assistant("Most likely it rose too little. Give it an hour more in a warm place.")],
                    [assistant("Bread is a staple food made of flour and water.")],
                ),
                "<|im_start|>user\nMy bread is dense. What went wrong?<|im_end|>\n<|im_start|>assistant\n",
                "⟦Most likely it rose too little. Give it an hour more in a warm place.<|im_end|>\n⟧",
                "⟦Bread is a staple food made of flour and water.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "a system prompt in a column of its own, in French",
        [
            {
                "system": "Réponds en une phrase.",
                "prompt": "Pourquoi le ciel est-il bleu ?",
                "chosen": "L'air diffuse davantage la lumière bleue.",
                "rejected": "C'est une question très intéressante !\n\nLe ciel…",
                "category": "physique",
            }
        ],
        [
            Expected(
                pair(
                    [system("Réponds en une phrase."), user("Pourquoi le ciel est-il bleu ?")],
                    [assistant("L'air diffuse davantage la lumière bleue.")],
                    [assistant("C'est une question très intéressante !\n\nLe ciel…")],
                    category="physique",
                ),
                "<|im_start|>system\nRéponds en une phrase.<|im_end|>\n"
                "<|im_start|>user\nPourquoi le ciel est-il bleu ?<|im_end|>\n<|im_start|>assistant\n",
                "⟦L'air diffuse davantage la lumière bleue.<|im_end|>\n⟧",
                "⟦C'est une question très intéressante !\n\nLe ciel…<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "an answer that is JSON is text all the same",
        [{"prompt": "An empty JSON list, please.", "chosen": "[]", "rejected": '[{"role": "user"}]'}],
        [
            Expected(
                pair([user("An empty JSON list, please.")], [assistant("[]")], [assistant('[{"role": "user"}]')]),
                "<|im_start|>user\nAn empty JSON list, please.<|im_end|>\n<|im_start|>assistant\n",
                "⟦[]<|im_end|>\n⟧",
                '⟦[{"role": "user"}]<|im_end|>\n⟧',
            )
        ],
    ),
]
