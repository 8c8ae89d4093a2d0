from tests.data.shapes import Case, Expected, assistant, pair, system, tool, user

CASES = [
    Case(
        "one turn",
        [
            {
                "conversations": [{"from": "human", "value": "Translate: good morning."}],
                "chosen": {"from": "gpt", "value": "Guten Morgen."},
                "rejected": {"from": "gpt", "value": "Gute Nacht."},
            }
        ],
        [
            Expected(
                pair([user("Translate: good morning.")], [assistant("Guten Morgen.")], [assistant("Gute Nacht.")]),
                "<|im_start|>user\nTranslate: good morning.<|im_end|>\n<|im_start|>assistant\n",
                "⟦Guten Morgen.<|im_end|>\n⟧",
                "⟦Gute Nacht.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "several turns, a tool's among them, and the system's in a column, in Portuguese",
        [
            {
                "system": "Você consulta o estoque.",
                "conversations": [
                    {"from": "human", "value": "Há parafusos?"},
                    {"from": "gpt", "value": "Vou ver."},
                    {"from": "observation", "value": "parafusos: 120"},
                ],
                "chosen": {"from": "gpt", "value": "Sim, 120."},
                "rejected": {"from": "gpt", "value": "Talvez."},
                "tools": '[{"name": "estoque"}]',
            }
        ],
        [
            Expected(
                pair(
                    [
                        system("Você consulta o estoque."),
                        user("Há parafusos?"),
                        assistant("Vou ver."),
                        tool("parafusos: 120"),
                    ],
                    [assistant("Sim, 120.")],
                    [assistant("Talvez.")],
                    arguments={"tools": [{"name": "estoque"}]},
                ),
                "<|im_start|>system\nVocê consulta o estoque.<|im_end|>\n<|im_start|>user\nHá parafusos?<|im_end|>\n"
                "<|im_start|>assistant\nVou ver.<|im_end|>\n<|im_start|>tool\nparafusos: 120<|im_end|>\n"
                "<|im_start|>assistant\n",
                "⟦Sim, 120.<|im_end|>\n⟧",
                "⟦Talvez.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "the other spelling, and answers that are text",
        [
            {
                "conversations": [
                    {"role": "developer", "content": "Answer with a number."},
                    {"role": "user", "content": "Legs of a spider?"},
                ],
                "chosen": "8",
                "rejected": "Six.",
            }
        ],
        [
            Expected(
                pair(
                    [system("Answer with a number."), user("Legs of a spider?")], [assistant("8")], [assistant("Six.")]
                ),
                "<|im_start|>system\nAnswer with a number.<|im_end|>\n"
                "<|im_start|>user\nLegs of a spider?<|im_end|>\n<|im_start|>assistant\n",
                "⟦8<|im_end|>\n⟧",
                "⟦Six.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "messages up to the answer, beside the answers",
        [
            {
                "messages": [{"role": "user", "content": "A river?"}],
                "chosen": {"role": "assistant", "content": "The Elbe."},
                "rejected": '{"value": "No."}',
            }
        ],
        [
            Expected(
                pair([user("A river?")], [assistant("The Elbe.")], [assistant('{"value": "No."}')]),
                "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n",
                "⟦The Elbe.<|im_end|>\n⟧",
                '⟦{"value": "No."}<|im_end|>\n⟧',
            )
        ],
    ),
]
