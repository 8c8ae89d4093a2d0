"""A GGUF file is quantized anew as it is read: tensor by tensor, so that it is nowhere as a whole in many bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.core_model_loading import ConversionOps
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from dpo_cli.modeling.folders.completeness import load_complete
from dpo_cli.modeling.gguf.streaming import Streaming, read_as

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from dpo_cli.modeling.held import Held


def load_requantized(
    path: Path, sketch: PreTrainedModel, held: Held, device: torch.device | str, **told: Any
) -> PreTrainedModel:
    """Load a GGUF file under quantized layers.

    Where transformers has no reader for the architecture that goes tensor by tensor, the model is in memory as a whole
    first, in the dtype.

    Args:
        path: The file.
        sketch: The model without its weights, from a folder with its settings.
        held: How it is held: quantized.
        device: Where it is going to be.
        told: What transformers is told beside it.
    """
    loaded = held.loaded_as(sketch, device)
    layers = loaded.pop("quantization_config")
    config = AutoConfig.from_pretrained(sketch.name_or_path)
    file = {"gguf_file": path.name, "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
    if not is_gguf_arch_supported(read_gguf_metadata(str(path))[0]["general.architecture"]):
        with read_as(Streaming):
            built = held.built_as()
            whole = load_complete(AutoModelForCausalLM, str(path.parent), config=config, **file, **built, **told)
        return held.take_over(whole, device)
    file["quantization_config"].layers = layers
    with read_as(_Requantizer):
        model = load_complete(AutoModelForCausalLM, str(path.parent), config=config, **file, **loaded, **told)
    # Else it is called by the folder that the file is in.
    model.name_or_path = model.config.name_or_path = str(path)
    return held.settle(model, device)


class _Requantizer(GgufHfQuantizer):  # type: ignore[misc]
    """Reads a GGUF file, with layers that hold few bits in place of linear ones."""

    def __init__(self, quantization_config: GgufConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        layers: BitsAndBytesConfig = quantization_config.layers
        self.few = AutoHfQuantizer.from_config(layers, pre_quantized=False)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **others: Any) -> None:
        super()._process_model_before_weight_loading(model, **others)
        self.few._process_model_before_weight_loading(model, **others)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Let every conversion of a tensor end with its quantization."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        for conversion in conversions:
            conversion.quantization_operation = _Requantize(self.few)
        return conversions

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **others: Any) -> bool:
        """Tell whether a weight is held in few bits."""
        return bool(self.few.param_needs_quantization(model, param_name, **others))


class _Requantize(ConversionOps):  # type: ignore[misc]
    """Quantizes of the tensors at hand those that are held in few bits."""

    def __init__(self, few: Any) -> None:
        self.few = few

    def __deepcopy__(self, memo: dict[int, Any]) -> _Requantize:
        """Return itself: transformers copies every conversion for every tensor."""
        return self

    def convert(self, input_dict: dict[str, Any], model: Any = None, **others: Any) -> dict[str, Tensor]:
        """Return the tensors by name, some of them quantized."""
        few = {name: one for name, one in input_dict.items() if self.few.param_needs_quantization(model, name)}
        return {**input_dict, **self.few.get_quantize_ops().convert(few, model=model, **others)}
