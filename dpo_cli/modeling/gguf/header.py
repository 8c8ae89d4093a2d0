"""What a GGUF file says of a model, beside its vocabulary and its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_cli.modeling.gguf.architecture import Architecture
from dpo_cli.modeling.gguf.positions import written_positions
from dpo_cli.modeling.gguf.types import GgufType

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

_FLOATS = ("epsilon", "softcapping", "freq_base", "freq_base_swa", "scaling.factor", "beta_fast", "beta_slow", "scale")
"""How keys end whose numbers are floats, also where they are whole."""

_MISTRAL = "mistral"
"""A Llama of exactly this name transformers reads as a Mistral, which has a window and no biases."""


@dataclass(frozen=True)
class Header:
    """What a file says.

    Attributes:
        architecture: What it calls the kind of model.
        name: What it calls the model.
        kind: The type of its weights.
        settings: What it says of the model, by key, without the architecture in front.
    """

    architecture: str
    name: str
    kind: GgufType
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: PretrainedConfig, architecture: Architecture, name: str, kind: GgufType) -> Header:
        """Take it from a model's configuration."""
        said = {key: getattr(config, setting, None) for key, setting in architecture.settings.items()}
        said |= {key: value(config) if callable(value) else value for key, value in architecture.constants.items()}
        if architecture.rotary:
            said |= {f"rope.{key}": value for key, value in written_positions(config)[0].items()}
        return cls(architecture.name, name, kind, {key: value for key, value in said.items() if value is not None})

    def writer(self) -> GGUFWriter:
        """Return a writer to which all of it was added."""
        import gguf

        writer = gguf.GGUFWriter(None, self.architecture)
        writer.add_type("model")
        writer.add_name(_MISTRAL.capitalize() if self.name == _MISTRAL else self.name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if self.kind == "f32" else f"MOSTLY_{self.kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in self.settings.items():
            add_key(writer, f"{self.architecture}.{key}", value)
        return writer


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key of the kind of number that readers look for."""
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float) or key.endswith(_FLOATS):
        writer.add_float32(key, float(value))
    else:
        writer.add_uint32(key, value)
