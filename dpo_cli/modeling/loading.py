"""A folder, a GGUF file or a Hub id becomes a policy and its tokenizer; both become a folder again.

Nothing is executed that a model brings along: remote code is off, and weights that are pickled are read by
transformers with `weights_only=True`. A GGUF file is dequantized once, into the cache, and is an ordinary
model folder from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_cli.errors import FAILED, UserError, from_os_error
from dpo_cli.storage import DamagedFolder, cache_root, file_digest, sealed_folder, verify

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NO_PART_OF_A_MODEL = {"transformers_version", "_name_or_path", "architectures", "dtype", "use_cache"}
"""Settings that say where a model came from or how it is called, not what it answers."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_model(name: str, where: str | None = None) -> UserError | None:
    """Say what is wrong with a model's name, without loading anything."""
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return None
        return UserError(f"there is no GGUF file `{name}`", where, "check the path; `make model` fetches the demo's")
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        hint = "a model folder holds config.json, the weights and the tokenizer's files"
        return UserError(f"`{name}` is not a model folder: it has no config.json", where, hint)
    if path.is_file():
        hint = "name the folder that holds config.json, a .gguf file, or a Hub id"
        return UserError(f"`{name}` is neither a model folder nor a .gguf file", where, hint)
    if _HUB_ID.fullmatch(name):
        return None
    return UserError(f"there is no model folder `{name}`", where, "name a folder, a .gguf file or a Hub id")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UserError: It cannot be found or read.
    """
    from transformers import AutoTokenizer

    return _load(name, "tokenizer", lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def load_policy(name: str) -> PreTrainedModel:
    """Load a causal language model in float32, in evaluation mode (dropout off).

    Raises:
        UserError: It cannot be found or read, is no causal language model, or lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def load(folder: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        return model, report

    model, report = _load(name, "model", load)
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        what = f"the weights of {len(missing)} parameters are missing: {shown}"
        raise UserError(what, name, "the folder is incomplete, or its config.json is another model's")
    return model.eval()


def empty_policy(name: str) -> PreTrainedModel:
    """Build a model without its weights, which takes no time and no memory: its shapes and settings alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(name, "model", lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=False))
    with torch.device("meta"):
        model = _load(name, "model", lambda _: AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        model.tie_weights()
    return model


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Replace a model's weights by those that `save_pretrained` wrote into a folder.

    Raises:
        UserError: They are another model's.
    """
    saved = load_policy(str(folder))
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        hint = "the checkpoint is another model's: start again with `--overwrite`"
        raise UserError(f"the weights do not fit the model: {reason}", str(folder), hint) from None


@contextlib.contextmanager
def saved_model(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    doing: str,
    weights: dict[str, Tensor] | None = None,
) -> Iterator[Path]:
    """Write model and tokenizer as a sealed Hugging Face folder, to which the caller may add files.

    Args:
        target: The folder to appear.
        model: Its settings are written, and its weights unless `weights` are given.
        tokenizer: Written beside it.
        doing: What failed, where it fails.
        weights: The weights to write, by name, tied ones under each of their names.

    Raises:
        UserError: The disk refuses. `target` is as it was then.
    """
    from safetensors import SafetensorError

    try:
        with sealed_folder(target, {}) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            yield temporary
    except OSError as error:
        raise from_os_error(error, doing, str(target)) from error
    except SafetensorError as error:
        hint = "free some space on that disk, or choose another folder"
        raise UserError(f"{doing} failed: {error}", str(target), hint, status=FAILED) from error


def weights_digest(model: PreTrainedModel) -> str:
    """Return a digest of a model's architecture and of every weight's bytes."""
    import torch

    whole = hashlib.blake2b(digest_size=32)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NO_PART_OF_A_MODEL}
    whole.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.named_parameters():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def _load(name: str, kind: str, load: Callable[[str], _T]) -> _T:
    """Call a loader on what a name stands for."""
    if problem := check_model(name):
        raise problem
    folder = str(_resolved(name))
    with _explained(name, kind):
        return load(folder)


@contextlib.contextmanager
def _explained(name: str, kind: str) -> Iterator[None]:
    """Silence the libraries' bars and reports, and turn what they raise for bad input into a `UserError`."""
    from huggingface_hub.errors import HFValidationError
    from jinja2 import TemplateError
    from safetensors import SafetensorError
    from transformers.utils import logging as hf_logging

    # What they raise for a broken folder is of every kind, and none of it is ours: only their calls stand inside.
    expected = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, AttributeError, EOFError)
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except pickle.UnpicklingError as error:
        what = f"the {kind} cannot be loaded: its pickled weights hold more than tensors, or are damaged"
        hint = "nothing pickled is executed: choose a model whose weights are in .safetensors files"
        raise UserError(what, name, hint) from error
    except (*expected, struct.error, HFValidationError, TemplateError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "custom code" in reason:
            reason = "it brings code of its own"
            hint = "such code is never run: choose a model of an architecture that transformers has"
        elif reason.startswith("Unrecognized configuration class"):
            hint = "it is no causal language model: choose one that continues text"
        elif Path(name).exists():
            hint = "the model is incomplete or damaged: save or download it again"
        else:
            hint = "check the name; a Hub id needs the network, unless the model is in the Hub's cache already"
        raise UserError(f"the {kind} cannot be loaded: {reason.strip()}", name, hint) from error
    finally:
        hf_logging.set_verbosity(level)


def _resolved(name: str) -> Path | str:
    """Return what transformers loads for a name: the name, or the folder that a GGUF file was converted to."""
    path = Path(name)
    return _converted(path) if path.suffix.lower() == ".gguf" else name


def _converted(path: Path) -> Path:
    """Dequantize a GGUF file into a model folder in the cache, once for each content."""
    try:
        folder = cache_root() / "models" / file_digest(path)[:32]
    except OSError as error:
        raise from_os_error(error, "reading the model", str(path), status=2) from error
    if folder.exists():
        try:
            verify(folder)
            return folder
        except DamagedFolder as damage:
            _log.warning("the converted model is damaged (%s); converting again", damage)
    try:
        import gguf  # noqa: F401  (transformers needs it and explains its absence badly)
    except ImportError:
        hint = "install it with `pip install 'dpo-cli[gguf]'`"
        raise UserError("reading a GGUF file needs the package `gguf`", str(path), hint) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _log.warning("converting %s to an ordinary model folder, once; this takes up to a minute", path.name)
    parent, file = str(path.parent), path.name
    with _explained(str(path), "model"):
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            parent,
            gguf_file=file,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=file, dequantize=True),
        )
    # What is left are ordinary float32 weights; while these marks stay, transformers refuses to save them.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    with saved_model(folder, model, tokenizer, "keeping the converted model"):
        pass
    return folder
