"""What an adapter folder holds, as PEFT saves it: looked at and checked before torch or PEFT is needed.

Only what can be put into the base exactly, with nothing left out, is taken; everything else is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.folders.model_files import CONFIG, GENERATION, WHOLE_WEIGHTS, check_fetched, check_texts
from dpo_cli.settings import located
from dpo_cli.system.hub import cached_file, download_beside, is_hub_id, is_path
from dpo_cli.system.storage import MANIFEST

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of weights that it saves."""

_PICKLED = "adapter_model.bin"
_BESIDE = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja", "LICEN[CS]E*", GENERATION]
"""What of an adapter on the Hub is brought beside its settings and weights."""

_DAMAGED = "the adapter is damaged: save or download it again"
_MERGE = "merge it in PEFT (`merge_and_unload`), save the whole model, and name that"

_REFUSED = {
    "modules_to_save": "it has layers of the base in it that were trained as a whole",
    "target_parameters": "it changes parameters that are no layers of their own",
    "trainable_token_indices": "it changes the embeddings of tokens",
    "layer_replication": "it changes the number of layers",
    "lora_bias": "its layers have biases",
    "alora_invocation_tokens": "it only has an effect after certain tokens",
    "use_qalora": "it pools the inputs of its layers",
    "use_bdlora": "its matrices are block-diagonal",
    "velora_config": "its layers compress their inputs",
    "monteclora_config": "its weights are drawn at random in every pass",
    "arrow_config": "it chooses among several adapters",
    "kasa_config": "its layers have singular values beside A and B",
}
"""Settings of PEFT that make another layer than LoRA's of it, and what they do; unset, each is empty or false."""

_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""What A and B may have begun with (`init_lora_weights`): with these the base stays as it is."""

_CHOOSE_AMONG_TARGETS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings that leave layers out which the targets name."""

_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter on disk, of which everything can be used.

    Attributes:
        path: Its folder.
        base: The model that it belongs to, as the folder names it; empty where it names none.
        revision: The version of the base on the Hub; empty: the newest.
        rank: The rank of its layers.
        alpha: What their scale is computed from.
        dora: Whether they are DoRA's.
        rslora: Whether the scale is rsLoRA's.
        targets: The layers: last parts of their names, or a regular expression of whole names.
        layers: Their whole names.
        shapes: The shape of each tensor, by its name in the file.
        ranks: The ranks of layers that have another, by a pattern of their names.
        alphas: The alphas of layers that have another, by a pattern of their names.
    """

    path: Path
    base: str
    revision: str
    rank: int
    alpha: float
    dora: bool
    rslora: bool
    targets: str | tuple[str, ...]
    layers: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


def is_adapter_id(name: str) -> bool:
    """Tell whether a name may be that of an adapter on the Hub: only models have ids without an owner."""
    return "/" in name and is_hub_id(name)


def adapter_folder(name: str | Path) -> Path:
    """Return the folder of an adapter: the one that is named, or where the Hub's cache has the adapter of an id."""
    if not is_adapter_id(str(name)):
        return Path(name)
    found = cached_file(str(name), ADAPTER_CONFIG)
    return found.parent if found else Path(name)


def fetch_adapter(name: str, where: str) -> None:
    """Bring the adapter of a Hub id into the Hub's cache; a model that is none is left where it is.

    Args:
        name: The id; the Hub has answered for it.
        where: The setting or option that names it.

    Raises:
        UserError: The Hub breaks off.
    """
    try:
        download_beside(name, ADAPTER_CONFIG, [ADAPTER_WEIGHTS, _PICKLED, *_BESIDE])
    except OSError as error:
        raise from_os_error(error, f"downloading the adapter `{name}`", where, status=2) from error


def holds_adapter(name: str | Path) -> bool:
    """Tell whether a name is that of a folder with an adapter in it, and without a whole model's weights."""
    folder = adapter_folder(name)
    try:
        return (folder / ADAPTER_CONFIG).is_file() and not any((folder / file).is_file() for file in WHOLE_WEIGHTS)
    except (OSError, ValueError):
        return False


def read_adapter(folder: Path, where: str | None = None) -> AdapterFolder:
    """Look at an adapter folder.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors; or an id that the Hub's cache has that of.
        where: The setting or option that names it.

    Raises:
        UserError: It is none, is damaged, or holds what cannot be put into the base exactly.
    """
    try:
        return _read(adapter_folder(folder))
    except UserError as error:
        raise UserError(f"the adapter `{folder}` is not loaded: {error.what}", where, error.hint) from None
    except OSError as error:
        raise from_os_error(error, f"reading the adapter `{folder}`", where, status=2) from error


def read_start(name: str, where: str) -> AdapterFolder:
    """Look at an adapter that training is to go on from.

    Args:
        name: Its folder, or its id on the Hub.
        where: The setting that names it.

    Raises:
        UserError: It is not usable, as `read_adapter` says, or rank or alpha differ among its layers.
    """
    folder = adapter_folder(name)
    if is_adapter_id(name) and not folder.is_dir():
        hint = "check the name; a Hub id needs the network, unless the adapter is in the Hub's cache already"
        raise UserError(f"the adapter {located(name)} is neither here nor among the Hub's adapters", where, hint)
    if not folder.is_dir():
        hint = "name a folder that PEFT or a run has saved, or a Hub id"
        is_file = "is a file, not an adapter folder" if folder.is_file() else "does not exist"
        raise UserError(f"the adapter {located(name)} {is_file}", where, hint)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise _no_adapter(folder, where)
    found = read_adapter(folder, where)
    for setting, differing in (("rank_pattern", found.ranks), ("alpha_pattern", found.alphas)):
        if differing:
            what = f"training cannot go on from the adapter `{name}`: not all of its layers are alike (`{setting}`)"
            raise UserError(what, where, "merge it into its base, and train another adapter beside the result")
    return found


def may_be_start(name: str | Path) -> bool:
    """Tell whether training can go on from what is in a folder: where it cannot, no hint should name it for that."""
    try:
        read_start(str(name), "")
    except UserError:
        return False
    return True


def _no_adapter(folder: Path, where: str) -> UserError:
    """Say what a folder is that is no adapter's."""
    if (folder / CONFIG).is_file():
        hint = "name it in `model.name`, and leave `adapter.start` out: the adapter is then a fresh one"
        return UserError(f"`{folder}` is a whole model, not an adapter", where, hint)
    hint = "name a folder that PEFT or a run has saved"
    if may_be_start(inside := folder / "final"):
        hint = f"did you mean `{inside}`?"
    return UserError(f"`{folder}` is not an adapter folder: it has no {ADAPTER_CONFIG}", where, hint)


def base_of(folder: str | Path, where: str | None = None) -> str:
    """Return the name of the base of an adapter in a folder.

    Args:
        folder: Holds the adapter.
        where: The setting or option that names it.

    Raises:
        UserError: The adapter cannot be used, as `read_adapter` says, or its base not be found, as `base_name` says.
    """
    return base_name(read_adapter(Path(folder), where), where)


def base_name(found: AdapterFolder, where: str | None = None) -> str:
    """Return the name of an adapter's base: a whole path that exists, or a Hub id.

    Args:
        found: The adapter.
        where: The setting or option that names it.

    Raises:
        UserError: It names none, or one that cannot be found from here.
    """
    path, told = Path(found.base), f"`base_model_name_or_path` in {found.path / ADAPTER_CONFIG}"
    hint = f"write the whole path of its base, or its Hub id, into {told}"
    if (found.path / MANIFEST).is_file():
        hint += f", and remove {found.path / MANIFEST}, which seals that file as it was"
    if not found.base:
        problem = "names no base"
    elif found.revision not in ("", "main") and not path.is_dir():
        problem = f"belongs to the version `{found.revision}` of `{found.base}`"
        hint = f"download that version, and write its path into {told}"
    elif not path.is_absolute() and (is_path(found.base) or path.exists()):
        problem = f"names its base by a relative path, `{found.base}`"
    elif path.is_absolute() and not path.exists():
        problem = f"belongs to `{found.base}`, which does not exist"
    elif holds_adapter(path):
        problem = f"belongs to `{found.base}`, which is an adapter itself"
        hint = f"merge that into its base, and write the path of the whole model into {told}"
    else:
        return found.base
    raise UserError(f"the adapter `{found.path}` {problem}", where, hint)


def _read(folder: Path) -> AdapterFolder:
    said = _settings(folder)
    check_texts(folder)
    _check_kind(said)
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise _wrong("r", rank, "a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (0 < alpha < math.inf):
        raise _wrong("lora_alpha", alpha, "a number above 0")
    switches = {name: said.get(name, False) for name in ("use_dora", "use_rslora")}
    for name, value in switches.items():
        if type(value) is not bool:
            raise _wrong(name, value, "true or false")
    ranks, alphas = (_pattern(said, name) for name in ("rank_pattern", "alpha_pattern"))
    shapes = _shapes(folder)
    layers = _layers(shapes, None if ranks else rank, dora=switches["use_dora"])
    return AdapterFolder(
        path=folder,
        base=_text(said, "base_model_name_or_path"),
        revision=_text(said, "revision"),
        rank=rank,
        alpha=float(alpha),
        dora=switches["use_dora"],
        rslora=switches["use_rslora"],
        targets=_targets(said, layers),
        layers=layers,
        shapes=shapes,
        ranks=ranks,
        alphas=alphas,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json."""
    try:
        said = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"it has no {ADAPTER_CONFIG}", None, "name a folder that PEFT or a run has saved") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{ADAPTER_CONFIG} cannot be read: {error}", None, _DAMAGED) from None
    if not isinstance(said, dict):
        raise UserError(f"{ADAPTER_CONFIG} is not a JSON object", None, _DAMAGED)
    return said


def _check_kind(said: Mapping[str, Any]) -> None:
    """Refuse what is no LoRA, or one with something beside it."""
    if said.get("peft_type") != "LORA":
        what = f"it is of the type {_shown(said.get('peft_type'))}, and only LORA is known"
        raise UserError(what, None, _MERGE)
    for name, meaning in _REFUSED.items():
        if said.get(name):
            raise UserError(f"{meaning} (`{name}`)", None, _MERGE)
    if said.get("bias") not in (None, "none"):
        raise UserError(f"it has biases of the base in it (`bias: {said['bias']}`)", None, _MERGE)
    if (began := said.get("init_lora_weights", True)) not in _LEAVE_THE_BASE:
        what = f"it belongs to a base that was changed when it began (`init_lora_weights: {began}`)"
        hint = "save it in PEFT with `path_initial_model_for_weight_conversion`, which makes it a plain adapter"
        raise UserError(what, None, hint)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the weights, without reading their values."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        if (folder / _PICKLED).is_file():
            hint = "load it in PEFT once and save it: `PeftModel.from_pretrained(…).save_pretrained(…)`"
            raise UserError(f"its weights are pickled ({_PICKLED})", None, hint)
        raise UserError(f"it has no {ADAPTER_WEIGHTS}", None, _DAMAGED)
    check_fetched([file])
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            for name, tensor in slices.items():
                if tensor.get_dtype() not in _FLOATS:
                    raise UserError(f"`{name}` is of the type {tensor.get_dtype()}", None, _MERGE)
            return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{ADAPTER_WEIGHTS} cannot be read: {error}", None, _DAMAGED) from None


def _layers(shapes: Mapping[str, tuple[int, ...]], rank: int | None, *, dora: bool) -> tuple[str, ...]:
    """Return the whole names of the layers; refuse tensors that are no part of one, and layers without a part.

    Args:
        shapes: The shape of each tensor, by name.
        rank: The rank of all layers, or None where each may have its own.
        dora: Whether each has a magnitude.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if not (found := _TENSOR.fullmatch(name)):
            raise UserError(f"it holds `{name}`, which is no part of a linear layer's LoRA", None, _MERGE)
        parts.setdefault(found["layer"], {})[found["part"]] = shape
    wanted = {"A", "B", *(["magnitude_vector"] if dora else [])}
    for layer, found_parts in parts.items():
        if found_parts.keys() != wanted:
            differing = sorted(found_parts.keys() ^ wanted)
            what = f"of `{layer}` it should have {', '.join(sorted(wanted))}, and {', '.join(differing)} differ"
            raise UserError(what, None, _DAMAGED)
        a, b = found_parts["A"], found_parts["B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (rank is not None and a[0] != rank):
            what = f"A and B of `{layer}` have the shapes {list(a)} and {list(b)}"
            raise UserError(what if rank is None else f"{what}, but the rank is {rank}", None, _DAMAGED)
    if not parts:
        raise UserError(f"{ADAPTER_WEIGHTS} is empty", None, _DAMAGED)
    return tuple(sorted(parts))


def _targets(said: Mapping[str, Any], layers: tuple[str, ...]) -> str | tuple[str, ...]:
    """Return which layers have it: as the folder names them, unless it leaves out some of these."""
    named = said.get("target_modules")
    if any(said.get(name) not in (None, [], "") for name in _CHOOSE_AMONG_TARGETS):
        return layers
    if isinstance(named, str) and named:
        try:
            re.compile(named)
        except re.error as error:
            raise UserError(f"`target_modules` is no regular expression: {error}", None, _DAMAGED) from None
        return named
    if isinstance(named, list) and named and all(isinstance(one, str) for one in named):
        return tuple(sorted(named))
    raise _wrong("target_modules", named, "names of layers or a regular expression")


def _pattern(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what layers have other values than the rest."""
    value = said.get(name) or {}
    numbers = isinstance(value, dict) and all(
        type(one) in (int, float) and 0 < one < math.inf for one in value.values()
    )
    if not numbers:
        raise _wrong(name, value, "a table of numbers above 0")
    return dict(value)


def _text(said: Mapping[str, Any], name: str) -> str:
    """Return a setting that is a text; empty where it is null."""
    value = said.get(name) or ""
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _wrong(name: str, value: object, wanted: str) -> UserError:
    return UserError(f"`{name}` in {ADAPTER_CONFIG} should be {wanted}, but is {_shown(value)}", None, _DAMAGED)


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
