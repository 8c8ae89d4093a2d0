"""What a model folder brings along, looked at before any library opens it.

Weights are read from safetensors files, settings from JSON: neither can hold code. What else may lie in such a
folder (pickled weights, Python files, an adapter that stands for another model) is refused, or left where it is.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import safe_open

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.quantization import check_headers, check_unquantized

CONFIG, GENERATION = "config.json", "generation_config.json"

_INDEX = ".index.json"
"""How the list of a model's weights ends where they are parted among several files."""

WHOLE_WEIGHTS = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
"""Where weights are looked for, in this order."""

_BY_PROCESS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""How files are called in which each process of a run saved its part of every weight."""

SHARDS, WEIGHTS = "shards.json", "weights"
"""What says where the rows of tensors are that were sharded over processes, and what it calls a model's weights."""

_TEXTS = {".json", ".jinja", ".model", ".txt"}
MOST_TEXT_BYTES = 1 << 26
"""More than any tokenizer's vocabulary takes."""

_COUNTS = {
    re.compile(r"(\w+_)?(layers?|blocks?)"): 1_000,
    re.compile(r"(\w+_)?(experts?|expert_num|labels?)"): 10_000,
}
"""Settings up to which libraries count before there is anything to compare them with, and the most that is built."""

_LANGUAGE_MODEL = re.compile(r"\w*(ForCausalLM|LMHead(Model)?|ForConditionalGeneration|GenerationDecoder)")
"""How architectures are called that continue text."""

_SPARE_ELEMENTS = 1 << 26
"""What a model may hold beyond its weights: masks, tables of positions."""

_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for a large one until Git fetches that."""

_MOST_POINTER_BYTES = 1024

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
"""The dtypes that weights are written in beside float32, as safetensors files call them."""

_DAMAGED = "the model is damaged: save or download it again"


@dataclass(frozen=True, slots=True)
class Trust:
    """What models may bring along because the configuration says so by name.

    Attributes:
        remote_code: Whether their Python files are run.
        pickle: Whether pickled weights are read, as bare tensors: nothing in them is executed.
        attention: The attention they get in place of the one that their settings name; None: theirs.
    """

    remote_code: bool = False
    pickle: bool = False
    attention: str | None = None


NO_TRUST = Trust()


def check_folder(folder: Path, trust: Trust, where: str | None = None) -> UserError | None:
    """Say what in a model folder is not going to be loaded; what is broken is left to the loader to tell.

    Args:
        folder: Where `config.json` stands.
        trust: What the folder may bring along.
        where: What names it: a setting or an option.
    """
    try:
        _check_company(folder)
        _check_generation(folder / GENERATION)
        settings = _read_json(folder / CONFIG)
        _check_settings(settings)
        files = weights_files(folder, settings)
        check_fetched([*files, *(path for path in folder.iterdir() if path.suffix in _TEXTS)])
        if not (folder / SHARDS).is_file():
            # There every file has other rows of the same weights.
            check_headers([file for file in files if file.suffix == ".safetensors"])
    except UserError as error:
        return UserError(f"`{folder}` is not loaded: {error.what}", where, error.hint)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if files and files[0].suffix == ".bin" and not trust.pickle:
        hint = "choose a model in .safetensors files; or set `model.allow_pickle: true`, which executes nothing either"
        return UserError(f"the weights of `{folder}` are pickled: {files[0].name}", where, hint)
    return None


def check_config(config: Path) -> None:
    """Refuse a `config.json` that came from the Hub by itself, before a model is built or downloaded after it.

    Raises:
        UserError: It asks for more than anybody builds, or for code.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        _check_settings(_read_json(config))


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a model folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def weights_files(folder: Path, settings: dict[str, Any] | None = None) -> list[Path]:
    """Return the files from which a model's weights are read; none where it has none.

    Args:
        folder: The model.
        settings: What its `config.json` says, where that was read already.

    Raises:
        UserError: They are said to stand outside the folder, or in a file of another kind.
    """
    for name in weights_names(folder, settings):
        if (folder / name).is_file():
            return [folder / part for part in parts_of(folder, name)]
    return sorted(folder.glob(f"{WEIGHTS}-*.safetensors")) if (folder / SHARDS).is_file() else []


def weights_names(folder: Path, settings: dict[str, Any] | None = None) -> Sequence[str]:
    """Return how files are called that may hold a model's weights, or their list; the first that exists does.

    Raises:
        UserError: As `weights_files`.
    """
    settings = _read_json(folder / CONFIG) if settings is None else settings
    named = settings.get("transformers_weights")
    return WHOLE_WEIGHTS if named is None else [_inside(named, ".safetensors")]


def parts_of(folder: Path, name: str) -> list[str]:
    """Return the files that a list of weights names, or the file itself where it holds the weights.

    Raises:
        UserError: As `weights_files`.
    """
    if not name.endswith(_INDEX):
        return [name]
    ending = Path(name.removesuffix(_INDEX)).suffix
    parts = _read_json(folder / name)["weight_map"].values()
    return [_inside(part, ending) for part in sorted(set(parts))]


def check_elements(num_elements: int, folder: Path) -> None:
    """Compare what a model would hold in memory with its weights on disk, before memory is taken.

    Args:
        num_elements: Numbers in its parameters and buffers, by its `config.json`.
        folder: The model.

    Raises:
        UserError: So many numbers are not in so many bytes, however few bits each takes.
    """
    num_bytes = sum(path.stat().st_size for path in weights_files(folder) if path.is_file())
    if num_bytes and num_elements > 2 * num_bytes + _SPARE_ELEMENTS:
        what = f"{CONFIG} asks for {num_elements:,} numbers, but its weights have {num_bytes:,} bytes"
        raise UserError(
            what, str(folder), "check that the folder is complete, and that its config.json belongs to this model"
        )


def stored_types(folder: Path) -> set[str]:
    """Return the dtypes that a folder of safetensors keeps its weights in; what float32 cannot hold is float32."""
    found: set[str] = set()
    for file in weights_files(folder):
        with safe_open(file, framework="numpy") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        found |= {_DTYPES.get(kind, "float32") for kind in kinds if "F" in kind}
    return found


def _inside(name: str, ending: str) -> str:
    """Return the name of a file with weights, which stands in the model's folder."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not name.removesuffix(_INDEX).endswith(ending):
        what = f"its weights are said to be in `{name}`"
        raise UserError(what, None, f"weights are {ending} files in the model's own folder")
    return name


def _check_company(folder: Path) -> None:
    """Refuse what would be loaded in place of the model's own weights, and settings that fill the memory."""
    for path in folder.iterdir():
        if path.name == "adapter_config.json":
            hint = "merge the adapter into its model; or remove that file, if the folder has a whole model"
            raise UserError("it is an adapter to another model (adapter_config.json)", None, hint)
        if _BY_PROCESS.fullmatch(path.name):
            hint = "merge them with transformers' `consolidate_distributed_checkpoint`"
            raise UserError(f"its weights are sharded by process ({path.name})", None, hint)
    check_texts(folder)


def check_texts(folder: Path) -> None:
    """Refuse settings that would fill the memory.

    Raises:
        UserError: A file of them is larger than any that there is.
    """
    for path in folder.iterdir():
        if path.suffix in _TEXTS and path.is_file() and path.stat().st_size > MOST_TEXT_BYTES:
            raise UserError(f"`{path.name}` is larger than {MOST_TEXT_BYTES:,} bytes", None, _DAMAGED)


def check_fetched(files: list[Path]) -> None:
    """Refuse files of which only the pointer is there.

    Raises:
        UserError: One is a pointer of Git LFS.
    """
    for file in files:
        if file.is_file() and file.stat().st_size <= _MOST_POINTER_BYTES and file.read_bytes().startswith(_POINTER):
            hint = "run `git lfs pull` in the folder"
            raise UserError(f"`{file.name}` is a Git LFS pointer: the file itself was not downloaded", None, hint)


def _check_generation(file: Path) -> None:
    """Refuse settings of generation that cannot be read: transformers would go on without them."""
    try:
        if file.is_file():
            _read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"`{file.name}` cannot be read: {error}", None, _DAMAGED) from None


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse numbers of parts that nobody builds, and attention that is code from the Hub."""
    for name, value in all_settings(settings):
        most = next((most for count, most in _COUNTS.items() if count.fullmatch(name)), None)
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise UserError(f"{CONFIG} sets `{name}` to more than {most:,}", None, _DAMAGED)
        if name.endswith("attn_implementation") and "/" in str(value):
            hint = "such code is never run: remove that setting from config.json"
            raise UserError(f"{CONFIG} asks for attention code from the Hub in `{name}`", None, hint)
    check_unquantized(settings)
    _check_architecture(settings)


def _check_architecture(settings: dict[str, Any]) -> None:
    """Refuse what is not a causal language model by the name of its architecture, before it is trained as one."""
    if "AutoModelForCausalLM" in (settings.get("auto_map") or {}):
        # Code of its own has names of its own.
        return
    hint = "choose a model that continues text: its architecture's name ends in `ForCausalLM`"
    named = settings.get("architectures") or []
    for name in [named] if isinstance(named, str) else named:
        if settings.get("is_encoder_decoder") is True:
            raise UserError(f"`{name}` is not a causal language model: an encoder reads its prompts", None, hint)
        if not _LANGUAGE_MODEL.fullmatch(name):
            raise UserError(f"`{name}` is not a causal language model", None, hint)


def all_settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every setting, those of the models within a composite one included."""
    for name, value in settings.items():
        yield name, value
        if isinstance(value, dict):
            yield from all_settings(value)


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return found


def most_tokens(config: Any) -> int | None:
    """Return the most tokens that a model's settings let it read, or None where nothing limits them."""
    text = config.get_text_config()
    # MPT's is the one name that transformers does not translate.
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
