"""What can be said about a model by its name and its folder's files, without loading weights or anything slow."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dpo_cli.errors import USAGE, UserError, from_os_error
from dpo_cli.modeling.adapters.files import base_of, fetch_adapter, holds_adapter
from dpo_cli.modeling.folders.model_files import CONFIG, NO_TRUST, Trust, check_fetched, check_folder, weights_files
from dpo_cli.settings import located
from dpo_cli.system.hub import cached_file, is_hub_id, look_up, name_hint

_GGUF = b"GGUF"
"""How a GGUF file begins."""


def check_model(name: str, where: str | None = None, trust: Trust = NO_TRUST) -> UserError | None:
    """Say what is wrong with a model's name or with what its folder brings along, without loading anything."""
    path = Path(name)
    if is_gguf(name):
        return _check_gguf(path, where)
    if holds_adapter(path):
        return _check_adapter(path, where, trust)
    if path.is_dir():
        if (path / CONFIG).is_file():
            return check_folder(path, trust, where)
        hint = model_inside(path) or "name a folder with config.json, the weights and the tokenizer's files"
        return UserError(f"`{name}` is not a model folder: it has no config.json", where, hint)
    if path.is_file():
        hint = "name the folder with config.json, a .gguf file, or a Hub id"
        return UserError(f"`{name}` is neither a model folder nor a .gguf file", where, hint)
    if is_hub_id(name):
        return None
    hint = name_hint(name, "name a folder, a .gguf file or a Hub id")
    return UserError(f"there is no model folder {located(name)}", where, hint)


def same_model(one: str, other: str) -> bool:
    """Tell whether two names are those of one folder, one file or one Hub id."""
    paths = Path(one), Path(other)
    return paths[0].samefile(paths[1]) if all(path.exists() for path in paths) else one == other


def _check_adapter(folder: Path, where: str | None, trust: Trust) -> UserError | None:
    """Say what is wrong with an adapter folder or with the base that it names."""
    try:
        base = base_of(folder, where)
    except UserError as error:
        return error
    return check_model(base, where, trust)


def whole_model(name: str) -> str:
    """Return the model whose weights are read for a name: of an adapter folder that is right, the base that it names.

    What is wrong with one is left to `check_model`.
    """
    if holds_adapter(name):
        with contextlib.suppress(UserError):
            return base_of(name)
    return name


def is_gguf(name: str | Path) -> bool:
    """Tell whether a name is that of a GGUF file, right or wrong; a folder may be called as it likes."""
    path = Path(name)
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def _check_gguf(file: Path, where: str | None) -> UserError | None:
    """Say what is wrong with a GGUF file, as far as its first bytes tell."""
    if not file.is_file():
        return UserError(f"there is no GGUF file {located(file)}", where, "check the path")
    try:
        check_fetched([file])
        with file.open("rb") as opened:
            start = opened.read(len(_GGUF))
    except UserError as error:
        return UserError(error.what, where, error.hint)
    except OSError as error:
        return from_os_error(error, f"reading `{file}`", where, status=USAGE)
    if start == _GGUF:
        return None
    what = "is empty" if not start else "is not a GGUF file: those begin with the letters `GGUF`"
    return UserError(f"`{file}` {what}", where, "download or copy it again, or name another model")


def model_inside(folder: Path) -> str | None:
    """Suggest what people mean who name a run's folder, or one that GGUF files lie in."""
    final = folder / "final"
    trained = (final / CONFIG).is_file() or holds_adapter(final)
    inside = [final] if trained else sorted(filter(is_gguf, folder.glob("*.gguf")))
    if len(inside) > 1:
        return f"name one of its {len(inside)} GGUF files, such as `{inside[0]}`"
    return f"did you mean `{inside[0]}`?" if inside else None


def missing_weights(name: str, where: str) -> UserError | None:
    """Say which file of weights a model folder lacks, without loading any; what is broken is left to the loader."""
    folder = Path(whole_model(name))
    try:
        files = weights_files(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # A name that is no folder ends here as well.
        return None
    lost = next((file.name for file in files if not file.is_file()), None if files else "model.safetensors")
    hint = "the model is incomplete: save or download it again"
    return UserError(f"the weights are missing: there is no {lost} in `{folder}`", where, hint) if lost else None


def look_up_model(name: str, where: str, kind: str = "model") -> UserError | None:
    """Say what is wrong with a model that is asked for on the Hub, without loading more than what an adapter is.

    Args:
        name: Its id.
        where: The setting or option that names it.
        kind: What it should be, in a word.
    """
    try:
        if look_up("model", name, where, kind):
            fetch_adapter(name, where)
            return None
    except UserError as error:
        return error
    if cached_file(name, CONFIG) or holds_adapter(name):
        return None
    hint = f"check the name; a Hub id needs the network, unless the {kind} is in the Hub's cache already"
    return UserError(f"the {kind} `{name}` cannot be loaded: the Hub cannot be reached", where, hint)
