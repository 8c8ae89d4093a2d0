from tests.data.shapes import Case, Expected, assistant, pair, tool, user

CALL = [{"type": "function", "function": {"name": "shell", "arguments": {"command": "ls"}}}]

CASES = [
    Case(
        "the last of several turns differs",
        [
            {
                "chosen": [
                    {"role": "user", "content": "Name a river."},
                    {"role": "assistant", "content": "The Danube."},
                    {"role": "user", "content": "How many countries does it cross?"},
                    {"role": "assistant", "content": "Ten, more than any other."},
                ],
                "rejected": [
                    {"role": "user", "content": "Name a river."},
                    {"role": "assistant", "content": "The Danube."},
                    {"role": "user", "content": "How many countries does it cross?"},
                    {"role": "assistant", "content": "Three."},
                ],
                "source": None,
            }
        ],
        [
            Expected(
                pair(
                    [user("Name a river."), assistant("The Danube."), user("How many countries does it cross?")],
                    [assistant("Ten, more than any other.")],
                    [assistant("Three.")],
                ),
                "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\nThe Danube.<|im_end|>\n"
                "<|im_start|>user\nHow many countries does it cross?<|im_end|>\n<|im_start|>assistant\n",
                "⟦Ten, more than any other.<|im_end|>\n⟧",
                "⟦Three.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "they part at the first answer; what follows belongs to the responses, in Spanish",
        [
            {
                "chosen": [
                    {"role": "user", "content": "Quiero aprender a nadar."},
                    {"role": "assistant", "content": "¡Bien! ¿Tiene miedo al agua?"},
                    {"role": "user", "content": "Un poco."},
                    {"role": "assistant", "content": "Entonces empiece en lo bajo."},
                ],
                "rejected": [
                    {"role": "user", "content": "Quiero aprender a nadar."},
                    {"role": "assistant", "content": "Salte al mar."},
                    {"role": "user", "content": "¿Y luego?"},
                    {"role": "assistant", "content": "Nade."},
                ],
            }
        ],
        [
            Expected(
                pair(
                    [user("Quiero aprender a nadar.")],
                    [
                        assistant("¡Bien! ¿Tiene miedo al agua?"),
                        user("Un poco."),
                        assistant("Entonces empiece en lo bajo."),
                    ],
                    [assistant("Salte al mar."), user("¿Y luego?"), assistant("Nade.")],
                ),
                "<|im_start|>user\nQuiero aprender a nadar.<|im_end|>\n<|im_start|>assistant\n",
                "⟦¡Bien! ¿Tiene miedo al agua?<|im_end|>\n⟧<|im_start|>user\nUn poco.<|im_end|>\n"
                "<|im_start|>assistant\n⟦Entonces empiece en lo bajo.<|im_end|>\n⟧",
                "⟦Salte al mar.<|im_end|>\n⟧<|im_start|>user\n¿Y luego?<|im_end|>\n"
                "<|im_start|>assistant\n⟦Nade.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "turns of the assistant that follow each other are one answer, though it begins alike",
        [
            {
                "chosen": [
                    {"role": "user", "content": "What is in this folder?"},
                    {"role": "assistant", "content": "One moment."},
                    {"role": "assistant", "content": "I list it.", "tool_calls": CALL},
                    {"role": "tool", "content": "a.txt b.txt"},
                    {"role": "assistant", "content": "Two files."},
                ],
                "rejected": [
                    {"role": "user", "content": "What is in this folder?"},
                    {"role": "assistant", "content": "One moment."},
                    {"role": "assistant", "content": "Nothing."},
                ],
            }
        ],
        [
            Expected(
                pair(
                    [user("What is in this folder?")],
                    [
                        assistant("One moment."),
                        assistant("I list it.", tool_calls=CALL),
                        tool("a.txt b.txt"),
                        assistant("Two files."),
                    ],
                    [assistant("One moment."), assistant("Nothing.")],
                ),
                "<|im_start|>user\nWhat is in this folder?<|im_end|>\n<|im_start|>assistant\n",
                "⟦One moment.<|im_end|>\n⟧<|im_start|>assistant\n⟦I list it.<|im_end|>\n⟧"
                "<|im_start|>tool\na.txt b.txt<|im_end|>\n<|im_start|>assistant\n⟦Two files.<|im_end|>\n⟧",
                "⟦One moment.<|im_end|>\n⟧<|im_start|>assistant\n⟦Nothing.<|im_end|>\n⟧",
            )
        ],
    ),
]
