from tests.data.shapes import Case, Expected, assistant, pair, system, user

CASES = [
    Case(
        "an instruction with something to work on",
        [
            {
                "instruction": "Rewrite this sentence in the passive voice.",
                "input": "The committee rejected the proposal.",
                "chosen": "The proposal was rejected by the committee.",
                "rejected": "The committee has rejected the proposal.",
                "id": 17,
            }
        ],
        [
            Expected(
                pair(
                    [user("Rewrite this sentence in the passive voice.", "The committee rejected the proposal.")],
                    [assistant("The proposal was rejected by the committee.")],
                    [assistant("The committee has rejected the proposal.")],
                ),
                "<|im_start|>user\nRewrite this sentence in the passive voice.\n"
                "The committee rejected the proposal.<|im_end|>\n<|im_start|>assistant\n",
                "⟦The proposal was rejected by the committee.<|im_end|>\n⟧",
                "⟦The committee has rejected the proposal.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "a system prompt and a history, in Chinese",
        [
            {
                "system": "你是一位耐心的老师。",
                "history": [["什么是质数？", "只能被 1 和它自己整除的数。"], ["举个例子？", "比如 7。"]],
                "instruction": "9 是质数吗？",
                "input": "",
                "chosen": "不是，9 能被 3 整除。",
                "rejected": "是的。",
            }
        ],
        [
            Expected(
                pair(
                    [
                        system("你是一位耐心的老师。"),
                        user("什么是质数？"),
                        assistant("只能被 1 和它自己整除的数。"),
                        user("举个例子？"),
                        assistant("比如 7。"),
                        user("9 是质数吗？"),
                    ],
                    [assistant("不是，9 能被 3 整除。")],
                    [assistant("是的。")],
                ),
                "<|im_start|>system\n你是一位耐心的老师。<|im_end|>\n<|im_start|>user\n什么是质数？<|im_end|>\n"
                "<|im_start|>assistant\n只能被 1 和它自己整除的数。<|im_end|>\n<|im_start|>user\n举个例子？<|im_end|>\n"
                "<|im_start|>assistant\n比如 7。<|im_end|>\n<|im_start|>user\n9 是质数吗？<|im_end|>\n"
                "<|im_start|>assistant\n",
                "⟦不是，9 能被 3 整除。<|im_end|>\n⟧",
                "⟦是的。<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "what a row may say beside its texts",
        [
            {
                "instruction": "Write a regular expression for a year.",
                "input": None,
                "system": None,
                "history": [],
                "chosen": r"\b\d{4}\b",
                "rejected": "year",
                "weight": 2,
                "margin": 0.5,
                "source": "forum",
                "category": ["code", "regex"],
            }
        ],
        [
            Expected(
                pair(
                    [user("Write a regular expression for a year.")],
                    [assistant(r"\b\d{4}\b")],
                    [assistant("year")],
                    weight=2.0,
                    margin=0.5,
                    source="forum",
                    category='["code", "regex"]',
                ),
                "<|im_start|>user\nWrite a regular expression for a year.<|im_end|>\n<|im_start|>assistant\n",
                "⟦\\b\\d{4}\\b<|im_end|>\n⟧",
                "⟦year<|im_end|>\n⟧",
            )
        ],
    ),
]
