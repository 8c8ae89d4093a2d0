"""What a GGUF file says of where a model comes from (`general.*`): its licence, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from dpo_cli.modeling.folders.provenance import HUB, Provenance

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FIELDS = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
"""By the key of a file, what the Hub calls the same on a model's card."""


def card_of_file(metadata: Mapping[str, Any]) -> str:
    """Return what a file says as the fields of a card, by which a folder that is made of the file tells it too.

    Args:
        metadata: The `general.*` keys of the file without that prefix, with their values.
    """
    said = {field: metadata[key] for key, field in _FIELDS.items() if isinstance(metadata.get(key), str)}
    count = metadata.get("base_model.count")
    named = [metadata.get(f"base_model.{number}.repo_url") for number in range(count if type(count) is int else 0)]
    bases = [one for one in named if isinstance(one, str)]
    front = {**said, **({"base_model": bases} if bases else {})}
    return f"---\n{yaml.safe_dump(front)}---\n" if front else ""


def add_provenance(writer: GGUFWriter, provenance: Provenance) -> None:
    """Add to a file where its model comes from, as far as that is known."""
    if licence := provenance.licence:
        writer.add_license(licence.id)
        if licence.name:
            writer.add_license_name(licence.name)
        if licence.link:
            writer.add_license_link(licence.link)
    if nearest := provenance.nearest:
        writer.add_base_model_count(len(nearest))
    for number, model in enumerate(nearest):
        owner, _, name = model.rpartition("/")
        writer.add_base_model_name(number, name)
        if owner:
            writer.add_base_model_organization(number, owner)
        writer.add_base_model_repo_url(number, f"{HUB}{model}")
