"""How every page is written from its template: what comes from data is text, and nothing else.

Every value that a template prints is made visible (`visible`) and escaped, unless a template made it; a name that a
template does not know is an error.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dpo_cli import __version__
from dpo_cli.reporting.safe_text import visible
from dpo_cli.reporting.tables import percent
from dpo_cli.system.text import several


def render(template: str, **values: Any) -> str:
    """Write a page.

    Args:
        template: The name of its template in this folder.
        values: What the template shows.
    """
    return _ENVIRONMENT.get_template(template).render(values) + "\n"


def code_in_backticks(sentence: str) -> Markup:
    """Write a sentence of the program, with the words between its backticks as code."""
    parts = map(escape, map(visible, sentence.split("`")))
    return Markup().join(Markup(f"<code>{part}</code>") if index % 2 else part for index, part in enumerate(parts))


def _seen(value: Any) -> Any:
    """Make what is printed visible, but for the parts that templates made."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(
    loader=PackageLoader(__package__, ""),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_seen,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["version"] = __version__
_ENVIRONMENT.filters |= {
    "code": code_in_backticks,
    "grouped": lambda count: f"{count:,}",
    "percent": percent,
    "several": several,
    "short": lambda number: f"{number:g}",
}
