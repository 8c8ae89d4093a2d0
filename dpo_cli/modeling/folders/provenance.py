"""Where a model comes from, as far as its folder tells it: its licence, its own base, its version on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.modeling.folders.model_files import CONFIG
from dpo_cli.system import plain_yaml
from dpo_cli.system.hub import CARD, is_hub_name

_MOST_BYTES = 1 << 20
_LICENCE_FILE = re.compile(r"(un)?licen[cs]e([._-][\w.-]*)?|copying", re.IGNORECASE)
_ID, _NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"), re.compile(r"[\w][\w .+-]{0,90}")
_LINK = re.compile(r"https://[\w./~%+#?=&-]{1,300}|[\w][\w.-]{0,60}")

_TEXTS = {
    "apache-2.0": (r"Apache License\s+Version 2\.0, January 2004", 12_500),
    "mit": (r"Permission is hereby granted, free of charge.+The above copyright notice and this permission", 1_600),
    "llama2": (r"\ALLAMA 2 COMMUNITY LICENSE AGREEMENT", 50_000),
    "llama3": (r"\AMETA LLAMA 3 COMMUNITY LICENSE AGREEMENT", 50_000),
    "llama3.1": (r"\ALLAMA 3\.1 COMMUNITY LICENSE AGREEMENT", 50_000),
    "llama3.2": (r"\ALLAMA 3\.2 COMMUNITY LICENSE AGREEMENT", 50_000),
    "llama3.3": (r"\ALLAMA 3\.3 COMMUNITY LICENSE AGREEMENT", 50_000),
    "llama4": (r"\ALLAMA 4 COMMUNITY LICENSE AGREEMENT", 50_000),
    "gemma": (r"\AGemma Terms of Use", 50_000),
    "gpl-3.0": (r"\AGNU GENERAL PUBLIC LICENSE\s+Version 3, 29 June 2007", 36_000),
    "agpl-3.0": (r"\AGNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3, 19 November 2007", 36_000),
}
"""By the Hub's id of a licence, how its text is known, and the most characters of one to which nothing was added."""

HUB = "https://huggingface.co/"
"""What comes before a model's id in its address."""

_HUB_ADDRESS = re.compile(rf"{re.escape(HUB)}([^/]+/[^/]+)/?")
_IN_CACHE = re.compile(r"models--(.+)")


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub names it.

    Attributes:
        id: Its id; `other` for one that has none.
        name: What one is called that has no id.
        link: Where that one is: an address, or a file beside the model.
    """

    id: str
    name: str = ""
    link: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """The fields of a card on the Hub."""
        others = {"license_name": self.name, "license_link": self.link}
        return {"license": self.id, **{field: value for field, value in others.items() if value}}


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        licence: Its licence; None: it is not known.
        hub_id: Its id on the Hub; empty where it is a folder or file of somebody's own.
        revision: Its commit there.
        bases: The ids of the models that it was made from, as its own card names them.
    """

    licence: Licence | None = None
    hub_id: str = ""
    revision: str = ""
    bases: tuple[str, ...] = ()

    @property
    def nearest(self) -> tuple[str, ...]:
        """The nearest models on the Hub that a model trained from this one comes from."""
        return (self.hub_id,) if self.hub_id else self.bases


def provenance_of(folder: Path) -> Provenance:
    """Return what a model's folder tells of where it comes from; what it does not tell stays open."""
    front = front_matter(_text(folder / CARD))
    hub_id, revision = _in_cache(folder)
    licence = _named(front) or _named(_settings(folder)) or _in_licence_file(folder)
    return Provenance(licence, hub_id, revision, () if hub_id else hub_ids(front.get("base_model")))


def front_matter(card: str) -> Mapping[str, Any]:
    """Return the fields of a card; none where it has none that can be read."""
    begins, _, rest = card.partition("---\n")
    fields, ends, _ = rest.partition("\n---")
    if begins.strip() or not ends:
        return {}
    try:
        found, _ = plain_yaml.parse(fields, unreadable=[])
    except plain_yaml.NotPlain:
        return {}
    return found if isinstance(found, Mapping) else {}


def hub_ids(named: Any) -> tuple[str, ...]:
    """Return the models that a field names by an id or an address of the Hub, one or several."""
    listed = named if isinstance(named, list) else [named]
    texts = [_HUB_ADDRESS.sub(r"\1", one) for one in listed if isinstance(one, str)]
    return tuple(text for text in texts if "/" in text and is_hub_name(text))


def _settings(folder: Path) -> Mapping[str, Any]:
    """Return what a model's config.json says; nothing where it says nothing."""
    try:
        found = json.loads(_text(folder / CONFIG))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _named(front: Mapping[str, Any]) -> Licence | None:
    """Return the licence that the fields of a card name, or settings with the same fields."""
    said, name, link = (front.get(field) for field in ("license", "license_name", "license_link"))
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if not isinstance(said, str) or not _ID.fullmatch(said.lower()) or said.lower() == "unknown":
        return None
    name = name if isinstance(name, str) and _NAME.fullmatch(name) else ""
    link = link if isinstance(link, str) and _LINK.fullmatch(link) else ""
    return Licence(said.lower(), name, link) if said.lower() == "other" else Licence(said.lower())


def _in_licence_file(folder: Path) -> Licence | None:
    """Return the licence whose text a file of the folder is; None where there are several, or it is not known."""
    try:
        files = [path for path in folder.iterdir() if _LICENCE_FILE.fullmatch(path.name)]
    except OSError:
        return None
    found = {_by_text(_text(path)) for path in files}
    licence = found.pop() if len(found) == 1 else None
    return Licence(licence) if licence else None


def _by_text(text: str) -> str | None:
    """Return the id of the licence that a text is; None for one that something was added to."""
    text = text.strip()
    for licence, (pattern, most) in _TEXTS.items():
        if len(text) <= most and re.search(pattern, text, re.DOTALL):
            changed = licence == "mit" and re.search("modified|modification", text, re.IGNORECASE)
            return None if changed else licence
    return None


def _in_cache(folder: Path) -> tuple[str, str]:
    """Return the id and the commit of a model in the Hub's cache; nothing for other folders."""
    found = _IN_CACHE.fullmatch(folder.parent.parent.name)
    if folder.parent.name != "snapshots" or not found:
        return "", ""
    return found[1].replace("--", "/"), folder.name


def _text(file: Path) -> str:
    """Return the text of a file; nothing where there is none, or none that can be read."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            return ""
        return file.read_text(encoding="utf-8").replace("\r\n", "\n").removeprefix("\ufeff")
    except (OSError, ValueError):
        return ""
