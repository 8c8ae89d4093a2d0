"""Names of models and datasets on the Hugging Face Hub: which names are asked for there, and whether it has them."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_cli.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["model", "dataset"]

CARD = "README.md"
"""The card of a model, as the Hub looks for it; a person may complete it, also there."""

_SECONDS = 10
"""How long an answer of the Hub is waited for. Its libraries try six times, file by file, which takes minutes."""

_REFUSALS = {401, 403, 404}
"""HTTP statuses by which the Hub says that it has no such thing, or not for everybody."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_log = logging.getLogger(__name__)


def is_path(name: str) -> bool:
    """Tell whether a name can only be a path: it begins with `.`, `/` or `~`, or with a folder that is here."""
    first, slash, _ = name.partition("/")
    return name.startswith((".", "/", "~")) or (bool(slash) and Path(first).is_dir())


def is_hub_id(name: str) -> bool:
    """Tell whether a name is a Hub id: it looks like one, and is nothing on this disk."""
    return is_hub_name(name) and not is_path(name) and not Path(name).exists()


def is_hub_name(name: str) -> bool:
    """Tell whether a name looks like a Hub id, whatever is on this disk."""
    # The Hub's own limit; a longer name may be none that a disk knows.
    return len(name) <= 96 and bool(_HUB_ID.fullmatch(name))


def public_name(name: str) -> str:
    """Return how a model or data is named to others: a Hub id as it is, of a path its last part alone."""
    return name if is_hub_id(name) else Path(name).name or name


def name_hint(name: str, hint: str) -> str:
    """Add to a hint why a name that looks like a Hub id is not asked for on the Hub, where that needs a word."""
    first, slash, _ = name.partition("/")
    if slash and not name.startswith((".", "/", "~")) and is_path(name):
        return f"{hint} (`{first}` is a local folder, so the Hub is not used)"
    return hint


def look_up(kind: Kind, name: str, where: str, called: str | None = None) -> bool:
    """Ask the Hub for a model or a dataset, once.

    Args:
        kind: Which of them it is.
        name: Its id.
        where: The setting or option that names it.
        called: What it is called in an error; None: its kind.

    Returns:
        Whether the Hub answered. Where it did not, its libraries use what they have on disk from now on.

    Raises:
        UserError: The Hub answered that there is none, or none for this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=_SECONDS)
    except HfHubHTTPError as error:
        if _status(error) in _REFUSALS:
            hint = "check the name; for a private one log in with `hf auth login`; a local folder must exist"
            raise UserError(
                f"the {called or kind} `{name}` cannot be loaded: it is not on the Hub", where, hint
            ) from None
        reason = f"status {_status(error)}"
    except Exception as error:
        # Errors on the way there are those of the HTTP library, which is not always the same one.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    else:
        return True
    _work_offline(reason)
    return False


def cached_file(name: str, file: str) -> Path | None:
    """Return where the Hub's cache on this disk has a file of a model, if it has it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:
        # What looks like an id has rules of its own, which this one breaks.
        return None
    return Path(found) if isinstance(found, str) else None


def download_beside(name: str, file: str, patterns: list[str]) -> None:
    """Bring a file of a model, and what lies beside it, into the Hub's cache; a model that lacks it is left alone.

    Args:
        name: The model's id; the Hub has answered for it.
        file: The file without which nothing is brought.
        patterns: The names of the files beside it.

    Raises:
        OSError: The Hub breaks off.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        revision = Path(hf_hub_download(name, file)).parent.name
    except EntryNotFoundError:
        return
    snapshot_download(name, revision=revision, allow_patterns=[file, *patterns], ignore_patterns=["*/*"])


def _work_offline(reason: str) -> None:
    """Let the Hub's libraries use what they have on disk; say so, unless the user has set that already."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _log.warning("the Hub cannot be reached (%s); using only files that were downloaded before", reason)
        # `datasets` reads the variable when it is imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)
