"""A repository on the Hub as the user's token sees it, and how its library is asked: once, and in silence.

Whatever goes wrong there is a `UserError`. The token is no part of any text here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.errors import FAILED, UserError
from dpo_cli.system.hub import CARD
from dpo_cli.system.storage import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ASKING_SECONDS, SENDING_SECONDS = 10, 300
"""How long the Hub may be silent: when it is asked something, and when a file is sent."""

_MOST_TEXT_BYTES = 2**22
_TOKEN = re.compile(r"[!-~]+")
_ADDRESS = re.compile(r"(\w+://[^\s?'\"]+)\?[^\s'\"]*")
"""An address with a query, in which addresses of the storage have their signature."""


class Unreachable(UserError):
    """The Hub gives no answer, which says nothing of the repository."""


@dataclass(frozen=True)
class Known:
    """A file that the Hub has.

    Attributes:
        size: Its bytes.
        sha256: The SHA-256 of a large file, in hex; None: it is a small one.
        blob: What git calls a small one by.
    """

    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.

    Attributes:
        name: Its name.
        exists: Whether it is there.
        private: Whether only its owners see it.
        head: Its newest commit, if it has one.
        files: Its files.
        written: The SHA-256 of each file that the last push wrote, by name.
        card_edited: Whether the model card is another one than that push wrote.
    """

    name: str
    exists: bool
    private: bool
    head: str | None = None
    files: Mapping[str, Known] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    card_edited: bool = False


def find_token() -> str | None:
    """Return the token of the Hub from where its library looks for it, or None.

    Raises:
        UserError: The place cannot be read, or what is there is no token.
    """
    from huggingface_hub import get_token

    hint = "log in with `hf auth login`, or set the environment variable HF_TOKEN"
    try:
        token = get_token()
    except Exception as error:
        # It may be asked for over the network, where a service of the build issues it.
        raise UserError(f"the token of the Hub cannot be read ({type(error).__name__})", "--push", hint) from None
    if token and not _TOKEN.fullmatch(token):
        # Libraries quote a header with such characters in their errors.
        raise UserError("the token of the Hub has spaces or characters that no token has", "--push", hint)
    return token


def is_offline() -> bool:
    """Tell whether the environment forbids to ask the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def silent_library(say: Callable[[str], None], *, bars: bool) -> Iterator[None]:
    """Let the Hub's library print nothing by itself but its progress bars.

    Args:
        say: Is told its warnings.
        bars: Whether its progress bars are shown.
    """
    # It configures its logger when this is imported.
    from huggingface_hub.utils.logging import get_logger
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, handler = get_logger("huggingface_hub"), _Handler(say)
    before, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    shown = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # What it and its libraries intend to change is not for users.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda message, *_: say(unsigned(str(message)))
        if not bars:
            disable_progress_bars()
        try:
            yield
        finally:
            logger.handlers, logger.propagate = before, propagate
            if shown and not bars:
                enable_progress_bars()


class _Handler(logging.Handler):
    """Passes the library's warnings on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(unsigned(record.getMessage()))


def unsigned(text: str) -> str:
    """Return a text without the queries of addresses: what they sign allows to write."""
    return _ADDRESS.sub(r"\1", text)


def check_writer(api: HfApi, repo: str) -> None:
    """Ask the Hub whose the token is, and check that it may write under a repository's owner.

    Raises:
        UserError: The Hub does not know the token, or it may not.
    """
    owner, hint = repo.partition("/")[0], "create a token with the right to write on the Hub's page of settings"
    with refusals(f"--push {repo}", "asking the Hub whose the token is"):
        _patient(ASKING_SECONDS)
        user = api.whoami()
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError("the token of the Hub may only read", f"--push {repo}", hint)
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scopes, list) and not _writes(scopes, owner, repo):
        raise UserError(f"the token of the Hub may not write `{repo}`", f"--push {repo}", hint)
    roles = {org.get("name"): org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user.get("name") and owner not in roles:
        named = ", ".join(f"`{name}`" for name in (user.get("name"), *roles) if name)
        what = f"`{owner}` is neither the owner of the token nor an organization of theirs"
        raise UserError(what, f"--push {repo}", f"publish under one of {named}; or use another token")
    if roles.get(owner) == "read":
        what = f"the owner of the token may only read in the organization `{owner}`"
        raise UserError(what, f"--push {repo}", f"publish under `{user.get('name')}`, or ask for the right to write")


def _writes(scopes: list[Any], owner: str, repo: str) -> bool:
    """Tell whether a token for certain purposes may write a repository."""
    named = [scope for scope in scopes if scope.get("entity", {}).get("name") in (owner, repo)]
    return any("write" in permission for scope in named for permission in scope.get("permissions", []))


def look_at(api: HfApi, repo: str) -> Repository:
    """Ask the Hub for a repository, its files and what the last push to it wrote.

    Raises:
        UserError: The Hub does not answer, or the token may not change it.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with refusals(f"--push {repo}", "asking the Hub for the repository"):
        _patient(ASKING_SECONDS)
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return Repository(repo, exists=False, private=True)
        _check_access(api, repo)
        # The newest commit, not what is there a moment later.
        listed = api.list_repo_tree(repo, recursive=True, revision=info.sha)
        files = {
            file.path: Known(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in listed
            if isinstance(file, RepoFile)
        }
        written = _last_written(api, repo, str(info.sha), files)
        card = _small_file(api, repo, str(info.sha), CARD, files) if CARD in written else None
        edited = card is not None and hashlib.sha256(card).hexdigest() != written[CARD]
    return Repository(repo, True, bool(info.private), info.sha, files, written, edited)


def _check_access(api: HfApi, repo: str) -> None:
    """Ask whether the token may change a repository, as far as the library and the Hub answer that."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.auth_check(repo, write=True)
    except TypeError:
        # Earlier versions of the library ask for reading alone.
        pass
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise


def _last_written(api: HfApi, repo: str, head: str, files: Mapping[str, Known]) -> dict[str, str]:
    """Return what the manifest in a repository says was written there; none, or nonsense: nothing."""
    text = _small_file(api, repo, head, MANIFEST, files)
    try:
        said = json.loads(text or b"")["files"]
        return {str(name): str(file["sha256"]) for name, file in said.items()} | {MANIFEST: ""}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _small_file(api: HfApi, repo: str, head: str, name: str, files: Mapping[str, Known]) -> bytes | None:
    """Return the content of a file of a repository, unless it has none, or one that is too large for what it is."""
    if name not in files or files[name].size > _MOST_TEXT_BYTES:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return Path(api.hf_hub_download(repo, name, revision=head, local_dir=scratch)).read_bytes()


def patient_sending() -> None:
    """Let the Hub be silent for as long as it may when it is sent something."""
    _patient(SENDING_SECONDS)


def _patient(seconds: float) -> None:
    """Limit how long the Hub may be silent; its library would wait for ever."""
    from huggingface_hub import get_session

    get_session().timeout = seconds


@contextlib.contextmanager
def refusals(where: str, doing: str, hint: str | None = None) -> Iterator[None]:
    """Turn what the Hub's library raises into a `UserError`.

    Args:
        where: The option that it concerns.
        doing: What failed, where it fails.
        hint: How to go on, beside what is said of the error.

    Raises:
        UserError: The Hub refuses, or does not answer.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Errors on the way there are those of the HTTP library, which is not always the same one.
        status, reason = _reason(error)
        kind = UserError if status and status < 500 and status not in (408, 429) else Unreachable
        advice = "; ".join(filter(None, [_advice(status), hint]))
        # What a chained error has in its texts is printed with a traceback.
        raise kind(f"{doing} failed: {reason}", where, advice, status=FAILED) from None


def _reason(error: BaseException) -> tuple[int | None, str]:
    """Return the status that the Hub answered with, if it did, and its own words, or the library's."""
    chain = list(_chain(error))
    responses = [response for one in chain if (response := getattr(one, "response", None)) is not None]
    if not responses:
        words = " ".join(unsigned(str(error)).split())
        return None, words or type(error).__name__
    said = next(filter(None, (getattr(one, "server_message", None) for one in chain)), responses[0].reason_phrase)
    status = int(responses[0].status_code)
    return status, f"status {status}, {unsigned(' '.join(str(said).split()))}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _advice(status: int | None) -> str:
    """Say what to do about a refusal."""
    if status is None or status >= 500 or status == 408:
        return "check the network, and whether the Hub works"
    return {
        401: "log in again with `hf auth login`, or correct HF_TOKEN, which is used first",
        403: "check that the token may write there, and that there is room for what is sent",
        404: "check the name of the repository, and that the token may see it",
        409: "check whether the repository is there already",
        412: "the repository was changed meanwhile: look at it, and start again",
        413: "that is more than the Hub takes",
        429: "wait, since too much was asked in a short time",
    }.get(status, "check what the Hub says")
