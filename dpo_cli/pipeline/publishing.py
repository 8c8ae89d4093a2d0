"""`dpo export --push`: an exported folder becomes a repository on the Hub, all of it in one commit.

What can be known is asked before anything is exported. Large files are sent ahead, one after the other: the Hub keeps
what has arrived, and shows none of it before the commit. So an interrupted push is started again, and sends the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.publishing import Publishing
from dpo_cli.errors import FAILED, UserError, raise_all
from dpo_cli.pipeline.published_texts import local_texts
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.secrets import cover
from dpo_cli.system.hub import CARD
from dpo_cli.system.hub_repository import (
    Known,
    Repository,
    Unreachable,
    check_writer,
    find_token,
    is_offline,
    look_at,
    patient_sending,
    refusals,
    silent_library,
)
from dpo_cli.system.storage import MANIFEST, DamagedFolder, file_digest, manifest_bytes, verify
from dpo_cli.system.text import several

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_OF_THE_HUB = {".gitattributes", CARD, MANIFEST}
"""Files that say nothing of whose model a repository has."""

_READ = re.compile(
    r"(?:.+\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|index\.json|py|jinja|tiktoken|model))"
    r"|(?:config|generation_config|adapter_config|tokenizer(?:_config)?|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt",
    re.IGNORECASE,
)
"""Files beside which a published model would be read as another one."""


_MESSAGE = "Publish what dpo exported"
"""What the commit says."""


@dataclass(frozen=True)
class Outgoing:
    """A file that is published.

    Attributes:
        name: Its path in the folder and in the repository.
        size: Its bytes.
        sha256: Their digest, in hex.
        content: Where they are, or they themselves.
    """

    name: str
    size: int
    sha256: str
    content: Path | bytes

    def is_same(self, known: Known) -> bool:
        """Tell whether the Hub has it already."""
        if known.sha256 is not None or known.size != self.size:
            return known.sha256 == self.sha256
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return known.blob == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a push makes of a repository.

    Attributes:
        sent: The files that the Hub does not have as they are.
        replaced: The names of those that it has otherwise.
        same: The names of those that it has already.
        removed: The names of what the last push wrote, and this one does not.
        kept: The names of what no push wrote.
        edited: Whether the card that is replaced was edited on the Hub.
    """

    sent: list[Outgoing]
    replaced: set[str]
    same: list[str]
    removed: list[str]
    kept: list[str]
    edited: bool


def ask_hub(asked: Publishing) -> tuple[HfApi, Repository]:
    """Ask all that can be known before anything is sent: the token, its rights, and the repository as it is.

    Raises:
        UserError: Nothing could be published; `Unreachable`: the Hub cannot be asked.
    """
    from huggingface_hub import HfApi

    where = f"--push {asked.repo}"
    if is_offline():
        hint = "unset the environment variables HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        raise Unreachable("the Hub is not asked, since the environment says that there is no network", where, hint)
    token = find_token()
    if token is None:
        hint = "log in with `hf auth login`, or set the environment variable HF_TOKEN"
        raise Unreachable("there is no token of the Hub", where, hint)
    cover(token)
    api = HfApi(token=token)
    check_writer(api, asked.repo)
    repository = look_at(api, asked.repo)
    raise_all(_conflicts(repository, asked))
    return api, repository


def check_published(asked: Publishing, console: Console) -> None:
    """Ask the Hub, before something is exported, whether it could be published.

    Raises:
        UserError: It could not.
    """
    with silent_library(console.warning, bars=False):
        ask_hub(asked)


def _conflicts(repository: Repository, asked: Publishing) -> Iterator[UserError]:
    """Yield what keeps a repository that is there from being the model's."""
    where = f"--push {asked.repo}"
    if repository.exists and not repository.private and not asked.public:
        hint = "add `--public`; or choose another name, or make it private on the Hub"
        yield UserError(f"`{asked.repo}` is public: everybody would see what is published", where, hint)
    foreign = [name for name in _unwritten(repository) if "/" not in name and _READ.fullmatch(name)]
    if foreign:
        listed = ", ".join(f"`{name}`" for name in foreign[:5]) + (" …" if len(foreign) > 5 else "")
        what = f"`{asked.repo}` has files of a model that was not published by `dpo export`: {listed}"
        yield UserError(what, where, "choose another name; or remove them on the Hub")


def _unwritten(repository: Repository) -> list[str]:
    """Return the names of a repository's files that no push wrote."""
    return sorted(name for name in repository.files if name not in repository.written and name not in _OF_THE_HUB)


def push(folder: Path, asked: Publishing, console: Console) -> dict[str, Any]:
    """Publish an exported folder, unless only a list is asked for; return the repository, commit and visibility.

    Raises:
        UserError: The folder is damaged, or the Hub refuses; what was sent stays there.
    """
    files, others = _outgoing(folder)
    with silent_library(console.warning, bars=console.has_status_line):
        try:
            api, repository = ask_hub(asked)
        except Unreachable as error:
            if not asked.dry_run:
                raise
            return _list_unasked(files, others, asked, error, console)
        plan = _plan(files, repository)
        _list(plan, repository, asked, others, console)
        found = {"repository": asked.repo, "private": repository.private if repository.exists else not asked.public}
        if asked.dry_run:
            console.result("nothing was sent: this is a dry run")
            return {**found, "commit": None}
        if not plan.sent and not plan.removed:
            console.result("nothing is left to send: the repository has all of it")
            return {**found, "commit": repository.head}
        with _going_on(folder, asked, console):
            return {**found, "commit": _send(api, plan, repository, asked, console)}


@contextlib.contextmanager
def _going_on(folder: Path, asked: Publishing, console: Console) -> Iterator[None]:
    """Say how to go on, where sending ends early."""
    again = f"dpo export {folder} --push {asked.repo}{' --public' * asked.public}"
    try:
        yield
    except UserError as error:
        # What the Hub has of it already is not sent again.
        error.hint = f"{error.hint}; the model is in `{folder}`, and `{again}` sends what is missing"
        raise
    except KeyboardInterrupt:
        console.answer(f"nothing is published yet; `{again}` sends what is missing")
        raise


def _outgoing(folder: Path) -> tuple[list[Outgoing], list[str]]:
    """Return the files that an export wrote, the card as it is now, and the names of what else is in the folder.

    Raises:
        UserError: A file is not as it was written, or contains what is only of this machine; an `ExceptionGroup` where
            several do.
    """
    try:
        manifest = verify(folder, edited={CARD})
    except DamagedFolder as damage:
        hint = f"export it again; only `{CARD}` may be edited"
        raise UserError(f"`{folder}` is damaged: {damage}", str(folder), hint) from None
    sealed: dict[str, Any] = manifest["files"]
    if CARD in sealed and (digest := file_digest(folder / CARD)) != sealed[CARD]["sha256"]:
        sealed[CARD] = {"bytes": (folder / CARD).stat().st_size, "sha256": digest}
    files = [Outgoing(name, said["bytes"], said["sha256"], folder / name) for name, said in sealed.items()]
    data = manifest_bytes(manifest)
    files.append(Outgoing(MANIFEST, len(data), hashlib.sha256(data).hexdigest(), data))
    raise_all(local_texts(folder, {file.name: file.content for file in files}))
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(files, key=lambda file: file.name), sorted(there - {file.name for file in files})


def _plan(files: list[Outgoing], repository: Repository) -> Plan:
    """Compare what is published with what the Hub has.

    A card that was edited there stays, unless the folder has another one than the last push wrote.
    """
    known, written, names = repository.files, repository.written, {file.name for file in files}
    stays = {file.name for file in files if repository.card_edited and written.get(file.name) == file.sha256} & {CARD}
    same = [file.name for file in files if file.name in known and file.is_same(known[file.name])]
    sent = [file for file in files if file.name not in same and file.name not in stays]
    return Plan(
        sent=sent,
        replaced={file.name for file in sent if file.name in known},
        same=same,
        removed=sorted(name for name in known if name in written and name not in names | _OF_THE_HUB),
        kept=sorted({*_unwritten(repository)} - names | stays),
        edited=repository.card_edited and not stays,
    )


def _list(plan: Plan, repository: Repository, asked: Publishing, others: list[str], console: Console) -> None:
    """Print where a folder goes, and what becomes of every file."""
    visibility = "private" if (repository.private if repository.exists else not asked.public) else "public"
    console.block()
    console.result(f"repository  {asked.repo} ({visibility}, {'exists already' if repository.exists else 'new'})")
    lines = [("replaced" if file.name in plan.replaced else "sent", file.name, file.size) for file in plan.sent]
    lines += [("the same", name, repository.files[name].size) for name in plan.same]
    lines += [("removed", name, repository.files[name].size) for name in plan.removed]
    lines += [("left alone", name, repository.files[name].size) for name in plan.kept]
    _print_files(lines, console)
    total = sum(file.size for file in plan.sent)
    console.result(f"{several(len(plan.sent), 'file')} to send, {readable_bytes(total)}")
    _name_others(others, console)
    if repository.exists and repository.private and asked.public:
        console.warning(f"`{asked.repo}` exists and stays private: `--public` is for new repositories")
    if plan.edited:
        console.warning(f"{CARD} was edited on the Hub: it is replaced, and stays in the repository's history alone")


def _list_unasked(
    files: list[Outgoing], others: list[str], asked: Publishing, reason: UserError, console: Console
) -> dict[str, Any]:
    """Print what would be sent to a repository of which nothing is known."""
    console.block()
    console.result(f"repository  {asked.repo} ({'public' if asked.public else 'private'}, if it is new)")
    _print_files([("sent", file.name, file.size) for file in files], console)
    total = sum(file.size for file in files)
    console.result(f"{several(len(files), 'file')} to send at most, {readable_bytes(total)}")
    _name_others(others, console)
    console.warning(f"the repository was not looked at: {reason.what}")
    console.result("nothing was sent: this is a dry run")
    return {"repository": asked.repo, "private": None, "commit": None}


def _print_files(lines: list[tuple[str, str, int]], console: Console) -> None:
    """Print what becomes of files, their names and sizes."""
    width, longest = max(len(what) for what, _, _ in lines), max(len(name) for _, name, _ in lines)
    for what, name, size in lines:
        console.result(f"  {what:<{width}}  {name:<{longest}}  {readable_bytes(size):>9}")


def _name_others(others: list[str], console: Console) -> None:
    """Say which files of the folder are not published."""
    if others:
        console.notice(f"not sent, since the export did not write them: {', '.join(others)}")


def _send(api: HfApi, plan: Plan, repository: Repository, asked: Publishing, console: Console) -> str:
    """Send what the Hub does not have, large files ahead, and let one commit show all of it; return the commit.

    Raises:
        UserError: The Hub refuses, or breaks off.
    """
    from huggingface_hub import CommitOperationDelete

    _check_card(plan, asked)
    if not repository.exists:
        repository = _created(api, asked)
    where, additions = f"--push {asked.repo}", []
    for number, file in enumerate(plan.sent, 1):
        console.notice(f"sending {file.name} ({readable_bytes(file.size)}, {number} of {len(plan.sent)})")
        with refusals(where, f"sending {file.name}"):
            additions.append(_sent_ahead(api, file, asked))
    removals = [CommitOperationDelete(name, is_folder=False) for name in plan.removed]
    with refusals(where, "publishing what was sent"):
        patient_sending()
        # Where somebody else has changed the repository meanwhile, the Hub refuses.
        done = api.create_commit(
            asked.repo, [*removals, *additions], commit_message=_MESSAGE, parent_commit=repository.head
        )
    visibility = "private" if repository.private else "public"
    console.result(f"published   {api.endpoint}/{asked.repo} ({visibility})")
    return str(done.oid)


def _sent_ahead(api: HfApi, file: Outgoing, asked: Publishing) -> CommitOperationAdd:
    """Send a large file, which nobody sees until it is committed; return what is to be committed.

    Raises:
        UserError: The repository takes no such file.
    """
    from huggingface_hub import CommitOperationAdd

    patient_sending()
    addition = CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
    # Else it would be read once more.
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    api.preupload_lfs_files(asked.repo, [addition], free_memory=False)
    if getattr(addition, "_should_ignore", False):
        # The library would leave it out of the commit, and say nothing.
        what = f"the `.gitignore` of `{asked.repo}` leaves out {file.name}"
        raise UserError(what, f"--push {asked.repo}", "remove that rule on the Hub", status=FAILED)
    return addition


def _created(api: HfApi, asked: Publishing) -> Repository:
    """Create the repository; return what the Hub made.

    Raises:
        UserError: The Hub refuses, or has made it public unasked.
    """
    where = f"--push {asked.repo}"
    with refusals(where, "creating the repository"):
        patient_sending()
        api.create_repo(asked.repo, private=not asked.public, exist_ok=True)
    made = look_at(api, asked.repo)
    raise_all(_conflicts(made, asked))
    return made


def _check_card(plan: Plan, asked: Publishing) -> None:
    """Let the Hub check the card's metadata, which it would refuse after everything else was sent.

    Raises:
        UserError: They are wrong.
    """
    card = next((file for file in plan.sent if file.name == CARD), None)
    if card is None or isinstance(card.content, bytes):
        return
    from huggingface_hub import ModelCard

    with refusals(
        str(card.content), f"checking the metadata of {CARD}", f"correct what `{CARD}` has between its `---`"
    ):
        patient_sending()
        ModelCard(card.content.read_text(encoding="utf-8")).validate()


def readable_bytes(size: int) -> str:
    """Return a size as the Hub shows it, in powers of 1,000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
