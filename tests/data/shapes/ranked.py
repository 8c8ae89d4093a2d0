from tests.data.shapes import Case, Expected, assistant, pair, user

SIEVE = "<|im_start|>user\nExplain a sieve.<|im_end|>\n<|im_start|>assistant\n"
GOOD, FAIR, POOR = "It strikes out multiples.", "It finds primes.", "A kitchen tool."

CASES = [
    Case(
        "the best against the worst; an answer that is not judged good or bad by others is left out",
        [{"prompt": "Explain a sieve.", "responses": [FAIR, GOOD, POOR], "scores": [5, 9, 1.5]}],
        [
            Expected(
                pair([user("Explain a sieve.")], [assistant(GOOD)], [assistant(POOR)], margin=7.5),
                SIEVE,
                "⟦It strikes out multiples.<|im_end|>\n⟧",
                "⟦A kitchen tool.<|im_end|>\n⟧",
            )
        ],
    ),
    Case(
        "all that differ in rank, 1 being the best, in the spellings that an answer may have",
        [
            {
                "prompt": [{"role": "user", "content": "Explain a sieve."}],
                "responses": [
                    {"text": FAIR},
                    {"role": "assistant", "content": POOR},
                    [{"role": "assistant", "content": GOOD}],
                    {"model": "m", "response": "No."},
                ],
                "ranks": [2, 3, 1, 3],
            }
        ],
        [
            Expected(
                pair([user("Explain a sieve.")], [assistant(GOOD)], [assistant(FAIR)], margin=1.0),
                SIEVE,
                "⟦It strikes out multiples.<|im_end|>\n⟧",
                "⟦It finds primes.<|im_end|>\n⟧",
            ),
            Expected(
                pair([user("Explain a sieve.")], [assistant(GOOD)], [assistant(POOR)], margin=2.0),
                SIEVE,
                "⟦It strikes out multiples.<|im_end|>\n⟧",
                "⟦A kitchen tool.<|im_end|>\n⟧",
            ),
            Expected(
                pair([user("Explain a sieve.")], [assistant(GOOD)], [assistant("No.")], margin=2.0),
                SIEVE,
                "⟦It strikes out multiples.<|im_end|>\n⟧",
                "⟦No.<|im_end|>\n⟧",
            ),
            Expected(
                pair([user("Explain a sieve.")], [assistant(FAIR)], [assistant(POOR)], margin=1.0),
                SIEVE,
                "⟦It finds primes.<|im_end|>\n⟧",
                "⟦A kitchen tool.<|im_end|>\n⟧",
            ),
            Expected(
                pair([user("Explain a sieve.")], [assistant(FAIR)], [assistant("No.")], margin=1.0),
                SIEVE,
                "⟦It finds primes.<|im_end|>\n⟧",
                "⟦No.<|im_end|>\n⟧",
            ),
        ],
        ranked="all",
    ),
    Case(
        "a margin of the row's own, in Korean",
        [{"prompt": "인사해 줘.", "responses": ["싫어.", "안녕하세요!"], "scores": [0, 1], "margin": 0.25}],
        [
            Expected(
                pair([user("인사해 줘.")], [assistant("안녕하세요!")], [assistant("싫어.")], margin=0.25),
                "<|im_start|>user\n인사해 줘.<|im_end|>\n<|im_start|>assistant\n",
                "⟦안녕하세요!<|im_end|>\n⟧",
                "⟦싫어.<|im_end|>\n⟧",
            )
        ],
    ),
]
