"""A folder, a GGUF file or a Hub id becomes a policy and its tokenizer; both become a folder again.

Nothing is executed that a model brings along, unless the configuration says so by name (`Trust`), and what it asks
for is compared with what it holds before memory is taken. A GGUF file is dequantized once, into the cache, and is an
ordinary model folder from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.completeness import check_complete, say_untied, untied
from dpo_cli.modeling.held import FLOAT32, Held
from dpo_cli.modeling.hub import fetch_weights, fetched
from dpo_cli.modeling.model_files import (
    CONFIG,
    NO_TRUST,
    Trust,
    check_elements,
    check_folder,
    holds_tokenizer,
    weights_files,
)
from dpo_cli.modeling.model_names import check_model
from dpo_cli.modeling.quantization import check_pickles
from dpo_cli.modeling.refusals import reason_and_hint
from dpo_cli.system.storage import DamagedFolder, cache_root, file_digest, verify

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_NO_PART_OF_A_MODEL = {"transformers_version", "_name_or_path", "architectures", "dtype", "use_cache"}
"""Settings that say where a model came from or how it is called, not what it answers."""

_CONVERSION = 2
"""Counts up when GGUF files are converted otherwise than before."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def load_tokenizer(name: str, trust: Trust = NO_TRUST) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UserError: It cannot be found or read.
    """
    from transformers import AutoTokenizer

    if trust.remote_code:
        _log.warning(
            "`model.trust_remote_code`: Python files that come with a model are run with your rights: "
            "they can read, change and send whatever you can"
        )

    def load(folder: str) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
        words: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        if getattr(words, "dropout", None):
            # As that of models it is for their training; with it a text has other tokens each time.
            words.dropout = None
        return tokenizer

    try:
        return _load(name, "tokenizer", load, trust)
    except UserError as error:
        if not Path(name).is_dir() or holds_tokenizer(Path(name)):
            raise
        hint = "copy tokenizer.json and tokenizer_config.json there, or save or download the model again"
        raise UserError("the model has no tokenizer: its files are missing", name, hint) from error


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, name: str, where: str, trust: Trust = NO_TRUST) -> None:
    """Refuse another model whose ids stand for other tokens; a folder without a tokenizer is not asked.

    Args:
        tokenizer: What the pairs are tokenized with.
        name: The other model.
        where: What names it: a setting or an option.
        trust: What it may bring along.

    Raises:
        UserError: Ids differ; it names the first.
    """
    if Path(name).is_dir() and not holds_tokenizer(Path(name)):
        return
    ours, theirs = ({i: t for t, i in known.get_vocab().items()} for known in (tokenizer, load_tokenizer(name, trust)))
    if differing := sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]):
        shown = "; ".join(f"id {i} is {theirs[i]!r} there and {ours[i]!r} here" for i in differing[:3])
        what = f"`{name}` has another vocabulary than the pairs: {len(differing)} ids differ ({shown})"
        raise UserError(what, where, "choose a model with the same tokenizer as `model.name`")


def generation_config(name: str, trust: Trust = NO_TRUST) -> GenerationConfig:
    """Load what a model says of generation: of it the end tokens are used.

    Raises:
        UserError: The model cannot be found or read.
    """
    from transformers import AutoConfig, GenerationConfig

    def load(folder: str) -> GenerationConfig:
        if (Path(folder) / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        return GenerationConfig.from_model_config(config)

    return _load(name, "model", load, trust)


def end_at(model: PreTrainedModel, token: int) -> None:
    """Let generation end at a token too, by the settings that are saved with a model; others that end it stay."""
    for settings in (model.generation_config, model.config):
        known = getattr(settings, "eos_token_id", None)
        others = known if isinstance(known, list) else [known]
        ids = [token, *(other for other in others if other not in (None, token))]
        settings.eos_token_id = ids if len(ids) > 1 else token


def load_policy(name: str, trust: Trust = NO_TRUST, held: Held = FLOAT32) -> PreTrainedModel:
    """Load a causal language model, in float32 unless it is to be held otherwise, in evaluation mode (dropout off).

    Raises:
        UserError: It cannot be found or read, is not a causal language model, is quantized, lacks weights or has others
            than it uses, does not fit into memory, or brings along what it is not trusted with.
    """
    from transformers import AutoModelForCausalLM

    from dpo_cli.modeling.saving import remember

    def load(folder: str) -> PreTrainedModel:
        empty = _empty(folder, trust, held)
        _check_size(empty, Path(folder))
        if not Path(name).exists():
            fetch_weights(name, Path(folder), trust)
            if problem := check_folder(Path(folder), trust):
                raise problem
            _check_size(empty, Path(folder))
        check_pickles([file for file in weights_files(Path(folder)) if file.suffix == ".bin"])
        # Else transformers lets a service of the Hub convert pickled weights, and takes what comes back.
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
        safely = None if trust.pickle else True
        model = _complete(AutoModelForCausalLM, folder, use_safetensors=safely, **held.loaded_as(), **_how(trust))
        remember(model, Path(folder), trust)
        return model

    model = _load(name, "model", load, trust)
    if any(path.suffix == ".bin" for path in weights_files(Path(model.name_or_path))):
        _log.warning("`model.allow_pickle`: the weights of %s are read from a pickle, as bare tensors", name)
    _warn_of_another_name(model, name)
    if others := untied(model):
        say_untied(model)
        _log.warning(
            "config.json of %s ties %s to the embedding, but its weights have other values there: they are trained as "
            "they are, and what is saved says `tie_word_embeddings: false`",
            name,
            ", ".join(others),
        )
    return model


def _warn_of_another_name(model: PreTrainedModel, name: str) -> None:
    """Say where settings name an architecture of another type than theirs: other programs go by that name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = model.config.model_type
    for other in model.config.architectures or []:
        kinds = {known for known, called in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if called == other}
        if kinds and kind not in kinds and other != type(model).__name__:
            told = f"config.json of {name} says `model_type: {kind}` but names `{other}`, which is of another type"
            _log.warning("%s: it is trained as %s, and saved as that", told, type(model).__name__)


def empty_policy(name: str, trust: Trust = NO_TRUST, held: Held = FLOAT32) -> PreTrainedModel:
    """Build a model without its weights, which takes no time and no memory: its shapes and settings alone."""

    def build(folder: str) -> PreTrainedModel:
        empty = _empty(folder, trust, held)
        _check_elements(empty, Path(folder))
        return empty

    return _load(name, "model", build, trust)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Replace a model's weights by those that `save_pretrained` wrote into a folder.

    Of the folder, nothing but safetensors files is read: code and settings are the model's own.

    Raises:
        UserError: They are another model's.
    """
    if problem := check_folder(folder, NO_TRUST):
        raise problem
    with _explained(str(folder), "model"):
        saved = _complete(type(model), str(folder), config=model.config, use_safetensors=True)
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        hint = "the checkpoint belongs to another model: start again with `--overwrite`"
        raise UserError(f"the weights do not fit the model: {reason}", str(folder), hint) from None


def weights_digest(model: PreTrainedModel, own_name: Callable[[str], str | None] = str) -> str:
    """Return a digest of a model's architecture and of every weight's bytes, those that no gradient moves included.

    Args:
        model: The model.
        own_name: Returns the name that a weight has in the model by itself; None for one that was added to it.
    """
    import torch

    whole = hashlib.blake2b(digest_size=32)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NO_PART_OF_A_MODEL}
    whole.update(json.dumps(settings, sort_keys=True, default=str).encode())
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.nn.Parameter) and name not in parameters:
            continue  # Tied to one that counts already.
        if (own := own_name(name)) is None:
            continue
        whole.update(f"{own} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def _complete(loader: Any, folder: str, **settings: Any) -> PreTrainedModel:
    """Load a model of which every weight is there, and no other."""
    model: PreTrainedModel
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = loader.from_pretrained(folder, **{**FLOAT32.loaded_as(), **told, **settings})
    check_complete(model, report, str(Path(folder, settings.get("gguf_file", ""))))
    return model.eval()


def _empty(folder: str, trust: Trust, held: Held) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.modeling.saving import logits_alone

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **held.loaded_as(), **_how(trust))
        model.tie_weights()
    if model.config._attn_implementation == "flex_attention" and not torch.cuda.is_available():
        hint = "set `model.attention` to `eager` or `sdpa`"
        raise UserError("FlexAttention, which it asks for, computes no gradient without a GPU", None, hint)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and window < 1:
        what = f"{CONFIG} says `sliding_window: {window}`: no token would attend to any"
        raise UserError(what, None, "set it to null in config.json if tokens attend to all earlier tokens")
    logits_alone(model)
    return model


def _how(trust: Trust) -> dict[str, Any]:
    """Return how transformers is told what a model may bring along."""
    told: dict[str, Any] = {"trust_remote_code": trust.remote_code}
    return {**told, "attn_implementation": trust.attention} if trust.attention else told


def _check_size(model: PreTrainedModel, folder: Path) -> None:
    """Compare what a model would hold with its files and with the memory that is free, before any is taken.

    Raises:
        UserError: It is more than either.
    """
    _check_elements(model, folder)
    _check_room(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))


def _check_elements(model: PreTrainedModel, folder: Path) -> None:
    """Compare what a model would hold with its files.

    Raises:
        UserError: It is more.
    """
    check_elements(sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())), folder)


def _check_room(needed: int) -> None:
    """Refuse weights that are larger than the memory that is free.

    Raises:
        UserError: They are.
    """
    import torch

    from dpo_cli.modeling.memory import free_bytes

    free = free_bytes(torch.device("cpu"))
    if needed > free:
        what = f"its weights take {needed / 2**30:.1f} GiB in float32, but {free / 2**30:.1f} GiB of memory are free"
        raise UserError(what, None, "choose a smaller model, or a machine with more memory")


def _load(name: str, kind: str, load: Callable[[str], _T], trust: Trust) -> _T:
    """Call a loader on the folder that a name stands for."""
    if problem := check_model(name, trust=trust):
        raise problem
    folder = _resolved(name)
    with _explained(name, kind):
        return load(str(folder if Path(folder).is_dir() else fetched(name)))


@contextlib.contextmanager
def _explained(name: str, kind: str) -> Iterator[None]:
    """Silence the libraries' bars and reports, and turn what they raise for bad input into a `UserError`."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except UserError as error:
        error.where = error.where or name
        raise
    except pickle.UnpicklingError as error:
        what = f"the {kind} cannot be loaded: its pickled weights hold more than tensors, or are damaged"
        hint = "nothing pickled is executed: choose a model whose weights are in .safetensors files"
        raise UserError(what, name, hint) from error
    except Exception as error:
        # What they raise for a broken folder is of every kind, and none of it is ours: only their calls stand inside.
        path = Path(name)
        # Of a Hub id nothing is here yet, or nothing was wrong with it.
        reason, hint = reason_and_hint(error, name, path if path.exists() else None)
        raise UserError(f"the {kind} cannot be loaded: {reason}", name, hint) from error
    finally:
        hf_logging.set_verbosity(level)


def _resolved(name: str) -> Path | str:
    """Return what transformers loads for a name: the name, or the folder that a GGUF file was converted to."""
    path = Path(name)
    return _converted(path) if path.suffix.lower() == ".gguf" else name


def _converted(path: Path) -> Path:
    """Dequantize a GGUF file into a model folder in the cache, once for each content."""
    try:
        folder = cache_root() / "models" / f"{file_digest(path)[:32]}-{_CONVERSION}"
    except OSError as error:
        raise from_os_error(error, "reading the model", str(path), status=2) from error
    if folder.exists():
        try:
            verify(folder)
            return folder
        except DamagedFolder as damage:
            _log.warning("the converted model is damaged (%s); converting again", damage)
    try:
        import gguf  # transformers needs it as well, and explains its absence badly
    except ImportError:
        hint = "install it with `pip install 'dpo-cli[gguf]'`"
        raise UserError("reading a GGUF file needs the package `gguf`", str(path), hint) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from dpo_cli.modeling.gguf_files import check_all_read, settle_positions
    from dpo_cli.modeling.saving import saved_model

    _log.warning("converting %s to an ordinary model folder, once; this takes up to a minute", path.name)
    parent, file = str(path.parent), path.name
    with _explained(str(path), "model"):
        reader = gguf.GGUFReader(path)
        _check_room(sum(4 * int(tensor.n_elements) for tensor in reader.tensors))
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
        told = {"gguf_file": file, "quantization_config": GgufConfig(gguf_file=file, dequantize=True)}
        model = _complete(AutoModelForCausalLM, parent, **told)
        check_all_read(model, reader)
        settle_positions(model, reader)
    # What is left are ordinary float32 weights; while these marks stay, transformers refuses to save them.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    with saved_model(folder, model, tokenizer, "keeping the converted model"):
        pass
    return folder
