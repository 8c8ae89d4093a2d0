from tests.data.shapes import Case, Expected, assistant, pair, system, tool, user

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}

ASKED = [{"role": "user", "content": "A river?"}]
SAID = {"role": "assistant", "content": "The Elbe."}
AGAIN = {"role": "user", "content": "Another?"}
TOOL = {"type": "function", "function": {"name": "f"}}

CASES = [
    Case(
        "one turn, the system's before it",
        [
            {
                "prompt": [
                    {"role": "system", "content": "You are a pharmacist."},
                    {"role": "user", "content": "May I take ibuprofen with coffee?"},
                ],
                "chosen": [{"role": "assistant", "content": "Yes; take it with some food as well."}],
                "rejected": [{"role": "assistant", "content": "Never drink coffee."}],
            }
        ],
        [
            Expected(
                pair(
                    [system("You are a pharmacist."), user("May I take ibuprofen with coffee?")],
                    [assistant("Yes; take it with some food as well.")],
                    [assistant("Never drink coffee.")],
                ),
                "<|im_start|>system\nYou are a pharmacist.<|im_end|>\n"
                "<|im_start|>user\nMay I take ibuprofen with coffee?<|im_end|>\n<|im_start|>assistant\n",
                "⟦Yes; take it with some food as well.<|im_end|>\n⟧",
                "⟦Never drink coffee.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "a tool is called within the answer; what it returns is not judged",
        [
            {
                "prompt": [
                    {
                        "role": "User",
                        "content": [
                            {"type": "text", "text": "Do I need "},
                            {"type": "text", "text": "a coat in Oslo?"},
                        ],
                    }
                ],
                "chosen": [
                    {"role": "assistant", "content": "Let me look.", "tool_calls": CALL, "name": None},
                    {"role": "function", "content": '{"celsius": -4}', "name": "weather", "tool_call_id": "c1"},
                    {"role": "gpt", "content": "Yes, it is freezing.", "thinking": "Below zero."},
                ],
                "rejected": [{"role": "assistant", "content": "Oslo is the capital of Norway.", "tool_calls": []}],
                "tools": [WEATHER],
                "chat_template_kwargs": {"enable_thinking": False},
            }
        ],
        [
            Expected(
                pair(
                    [user("Do I need a coat in Oslo?")],
                    [
                        assistant("Let me look.", tool_calls=CALL),
                        tool('{"celsius": -4}', name="weather", tool_call_id="c1"),
                        assistant("Yes, it is freezing.", reasoning_content="Below zero."),
                    ],
                    [assistant("Oslo is the capital of Norway.")],
                    arguments={"tools": [WEATHER], "enable_thinking": False},
                ),
                "<|im_start|>user\nDo I need a coat in Oslo?<|im_end|>\n<|im_start|>assistant\n",
                '⟦Let me look.<|im_end|>\n⟧<|im_start|>tool\n{"celsius": -4}<|im_end|>\n'
                "<|im_start|>assistant\n⟦Yes, it is freezing.<|im_end|>\n⟧",
                "⟦Oslo is the capital of Norway.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "the answers repeat the prompt, and go on for several turns, in Japanese",
        [
            {
                "prompt": [{"role": "user", "content": "自己紹介してください。"}],
                "chosen": [
                    {"role": "user", "content": "自己紹介してください。"},
                    {"role": "assistant", "content": "料理の助手です。"},
                    {"role": "user", "content": "得意料理は？"},
                    {"role": "assistant", "content": "親子丼です。"},
                ],
                "rejected": [
                    {"role": "user", "content": "自己紹介してください。"},
                    {"role": "assistant", "content": "いやです。"},
                ],
            }
        ],
        [
            Expected(
                pair(
                    [user("自己紹介してください。")],
                    [assistant("料理の助手です。"), user("得意料理は？"), assistant("親子丼です。")],
                    [assistant("いやです。")],
                ),
                "<|im_start|>user\n自己紹介してください。<|im_end|>\n<|im_start|>assistant\n",
                "⟦料理の助手です。<|im_end|>\n⟧<|im_start|>user\n得意料理は？<|im_end|>\n"
                "<|im_start|>assistant\n⟦親子丼です。<|im_end|>\n⟧",
                "⟦いやです。<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "the same first answer is a part of the prompt",
        [
            {
                "prompt": [{"role": "user", "content": "Guess my number."}],
                "chosen": [
                    {"role": "assistant", "content": "Is it 50?"},
                    {"role": "user", "content": "Higher."},
                    {"role": "assistant", "content": "Is it 75?"},
                ],
                "rejected": [
                    {"role": "assistant", "content": "Is it 50?"},
                    {"role": "user", "content": "Higher."},
                    {"role": "assistant", "content": "Is it 25?"},
                ],
            }
        ],
        [
            Expected(
                pair(
                    [user("Guess my number."), assistant("Is it 50?"), user("Higher.")],
                    [assistant("Is it 75?")],
                    [assistant("Is it 25?")],
                ),
                "<|im_start|>user\nGuess my number.<|im_end|>\n<|im_start|>assistant\nIs it 50?<|im_end|>\n"
                "<|im_start|>user\nHigher.<|im_end|>\n<|im_start|>assistant\n",
                "⟦Is it 75?<|im_end|>\n⟧",
                "⟦Is it 25?<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "a list and two texts, or two messages",
        [
            {"prompt": ASKED, "chosen": "The Elbe.", "rejected": "No."},
            {"prompt": ASKED, "chosen": SAID, "rejected": {"role": "assistant", "content": "No."}},
            {"prompt": ASKED, "chosen": [SAID], "rejected": '{"value": "No."}'},
        ],
        [
            Expected(
                pair([user("A river?")], [assistant("The Elbe.")], [assistant(said)]),
                "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n",
                "⟦The Elbe.<|im_end|>\n⟧",
                f"⟦{said}<|im_end|>\n⟧",
            )
            for said in ("No.", "No.", '{"value": "No."}')
        ],
    ),
    Case(
        "a prompt as an object with its messages",
        [{"prompt": {"messages": ASKED, "tools": [TOOL]}, "chosen": [SAID], "rejected": "No."}],
        [
            Expected(
                pair([user("A river?")], [assistant("The Elbe.")], [assistant("No.")], arguments={"tools": [TOOL]}),
                "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n",
                "⟦The Elbe.<|im_end|>\n⟧",
                "⟦No.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "turns that are not to be scored: the first of one response, the last of the other",
        [
            {
                "prompt": ASKED,
                "chosen": [SAID | {"weight": 0}, AGAIN, {"role": "assistant", "content": "Rhine.", "weight": 1}],
                "rejected": [
                    {"role": "assistant", "content": "No.", "train": True},
                    AGAIN,
                    {"role": "assistant", "content": "", "train": False},
                ],
            }
        ],
        [
            Expected(
                pair(
                    [user("A river?")],
                    [assistant("The Elbe."), user("Another?"), assistant("Rhine.")],
                    [assistant("No."), user("Another?"), assistant("")],
                ),
                "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n",
                "The Elbe.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
                "⟦Rhine.<|im_end|>\n⟧",
                "⟦No.<|im_end|>\n⟧<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
            )
        ],
    ),
]
