from tests.data.shapes import Case, Expected, assistant, pair, user

CASES = [
    Case(
        "the last of several answers differs",
        [
            {
                "chosen": "\n\nHuman: How do I get wax off a table?\n\nAssistant: Is it wood?\n\nHuman: Yes, oak."
                "\n\nAssistant: Harden it with ice, then lift it with a card.",
                "rejected": "\n\nHuman: How do I get wax off a table?\n\nAssistant: Is it wood?\n\nHuman: Yes, oak."
                "\n\nAssistant: Burn it off.",
            }
        ],
        [
            Expected(
                pair(
                    [user("How do I get wax off a table?"), assistant("Is it wood?"), user("Yes, oak.")],
                    [assistant("Harden it with ice, then lift it with a card.")],
                    [assistant("Burn it off.")],
                ),
                "<|im_start|>user\nHow do I get wax off a table?<|im_end|>\n"
                "<|im_start|>assistant\nIs it wood?<|im_end|>\n<|im_start|>user\nYes, oak.<|im_end|>\n"
                "<|im_start|>assistant\n",
                "⟦Harden it with ice, then lift it with a card.<|im_end|>\n⟧",
                "⟦Burn it off.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "they part earlier, at an answer",
        [
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: Hello! What can I do?\n\nHuman: A joke?\n\nAssistant: Sure: …",
                "rejected": "\n\nHuman: hi\n\nAssistant: What?\n\nHuman: never mind\n\nAssistant: Fine.",
            }
        ],
        [
            Expected(
                pair(
                    [user("hi")],
                    [assistant("Hello! What can I do?"), user("A joke?"), assistant("Sure: …")],
                    [assistant("What?"), user("never mind"), assistant("Fine.")],
                ),
                "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
                "⟦Hello! What can I do?<|im_end|>\n⟧<|im_start|>user\nA joke?<|im_end|>\n"
                "<|im_start|>assistant\n⟦Sure: …<|im_end|>\n⟧",
                "⟦What?<|im_end|>\n⟧<|im_start|>user\nnever mind<|im_end|>\n<|im_start|>assistant\n⟦Fine.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "paragraphs, a name within the line and a missing blank line at the start, in Italian",
        [
            {
                "chosen": "Human: Che cosa dice Human: qui?\n\nAssistant: Due cose.\n\nLa seconda: niente.\n",
                "rejected": "Human: Che cosa dice Human: qui?\n\nAssistant: Non so.",
            }
        ],
        [
            Expected(
                pair(
                    [user("Che cosa dice Human: qui?")],
                    [assistant("Due cose.\n\nLa seconda: niente.")],
                    [assistant("Non so.")],
                ),
                "<|im_start|>user\nChe cosa dice Human: qui?<|im_end|>\n<|im_start|>assistant\n",
                "⟦Due cose.\n\nLa seconda: niente.<|im_end|>\n⟧",
                "⟦Non so.<|im_end|>\n⟧",
            )
        ],
    ),
]
