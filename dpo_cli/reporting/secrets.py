"""What looks like a secret is covered in what the program says and writes about itself.

Covered are, wherever they occur: the value of an environment variable whose name speaks of a secret (`HF_TOKEN`,
`WANDB_API_KEY`); what is set by such a name (`api_key=…`, `--token …`); user and password in an address
(`https://user:token@host`); what begins like a token of a known service (`hf_…`); and what was given to `cover`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

COVERED = "[secret]"

_SHORTEST = 8
"""A shorter value of a variable may be any word."""

_NO_WORD = 16
"""A value of so many characters is no word that a text may contain by chance."""

_WORDS = r"(?:token|secret|passw(?:or)?d|passphrase|credentials?|(?:(?:api|access|private|auth|secret)[_-]?)+key)"
_SPEAKS = re.compile(rf"{_WORDS}|(?:^|_)(?:key|pat)$|_pwd$", re.IGNORECASE)
_OPTION = re.compile(rf"--?[\w-]*{_WORDS}", re.IGNORECASE)
_OF_SERVICES = r"""
    \b (?: hf_ [a-z0-9]{30,} | (?: gh[oprsu]_ | github_pat_ | glpat- | xox[abp]- | AKIA ) [a-z0-9_-]{12,} )
    | \b sk- (?= [a-z_-]* [0-9] ) [a-z0-9_-]{20,}
"""
_FORMS = re.compile(
    rf"""
    (?P<name>
        (?<! [a-z0-9] ) (?<! [be]os_ | pad_ | unk_ | sep_ | cls_ ) {_WORDS} ["']? \s? [=:] \s? (?P<quote> ["'] )?
    ) (?(quote) (?: \\. | (?! (?P=quote) ) . )+ | [^\s"',;&]+ )
    | (?P<scheme> [a-z][a-z0-9+.-]* :// ) [^\s/]+ (?= @ )
    | {_OF_SERVICES}
    """,
    re.IGNORECASE | re.VERBOSE,
)


_known: set[str] = set()
"""Secrets that are in no variable."""


def cover(secret: str) -> None:
    """Mask a secret that no variable contains, such as that of a file, from now on."""
    _known.add(secret)


def covered(text: str) -> str:
    """Return a text in which secrets are covered."""
    # One may begin with another.
    for value in sorted({*_secret_values(), *_known}, key=len, reverse=True):
        text = text.replace(value, COVERED)
    return _FORMS.sub(lambda found: f"{found['name'] or found['scheme'] or ''}{COVERED}", text)


def holds_secret(text: str) -> bool:
    """Tell whether a text contains a secret itself; a name that speaks of one may be that of a token of a tokenizer."""
    secret = any(value in text for value in {*_secret_values(), *_known} if len(value) >= _NO_WORD)
    return secret or bool(re.search(_OF_SERVICES, text, re.IGNORECASE | re.VERBOSE))


def covered_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which secrets are covered, those that follow the option that sets them included."""
    options = ["", *arguments[:-1]]
    return [
        COVERED if _OPTION.fullmatch(before) else covered(argument)
        for before, argument in zip(options, arguments, strict=False)
    ]


def _secret_values() -> Iterator[str]:
    """Yield the values of environment variables that are secret, by their names."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SPEAKS.search(name):
            yield value
