"""A Hub id becomes a folder in the Hub's cache, so that it is looked at and loaded as any other folder is."""

from __future__ import annotations

import contextlib
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from transformers.utils import cached_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.model_files import CONFIG, Trust, check_config, parts_of, weights_names

_BESIDE_WEIGHTS = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
    "USE_POLICY*",
]


def fetched(name: str) -> Path:
    """Bring what belongs to a model and is not weights into the Hub's cache.

    Raises:
        UserError: Its settings ask for what is refused.
        OSError: It cannot be found, or not be reached.
    """
    # transformers says best why a name leads nowhere.
    config = Path(cached_file(name, CONFIG))
    check_config(config)
    # Without a network, what is in the cache has to do.
    with contextlib.suppress(OSError, ValueError):
        snapshot_download(name, allow_patterns=_BESIDE_WEIGHTS, ignore_patterns=["*/*"], revision=config.parent.name)
    return config.parent


def fetch_weights(name: str, folder: Path, trust: Trust) -> None:
    """Bring a model's weights into the folder that `fetched` returned.

    Raises:
        UserError: It has none that are loaded.
        OSError: They cannot be reached.
    """
    where = {"revision": folder.name}
    for file in weights_names(folder):
        if (trust.pickle or ".bin" not in file) and cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, **where
        ):
            for part in parts_of(folder, file):
                cached_file(name, part, **where)
            return
    if is_offline_mode():
        hint = "unset HF_HUB_OFFLINE, or download the model first"
        raise UserError(
            f"the weights of `{name}` are not in the Hub's cache, and the network is switched off", None, hint
        )
    hint = "`model.allow_pickle: true` reads pickled ones, as bare tensors: nothing in them is executed"
    raise UserError(f"`{name}` has no .safetensors weights", None, hint)
