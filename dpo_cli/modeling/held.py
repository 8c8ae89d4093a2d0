"""How weights are held in memory: `Held` at the end lists the ways.

A way says what a model is loaded as, how many bytes that takes, and what an optimizer steps on.

This file is read with the configuration, before torch is needed: import torch and bitsandbytes inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BitsAndBytesConfig, PreTrainedModel

Dtype = Literal["float32", "bfloat16", "float16"]


class HeldSettings(Settings):
    """Hold every weight in one dtype of torch; the optimizer steps on the weights themselves."""

    dtype: Dtype = "float32"
    """The dtype of the weights."""
    quantized: ClassVar[bool] = False
    """Whether matrices have fewer bits a weight than it."""

    def __str__(self) -> str:
        """Name the way."""
        return self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights, as torch has it."""
        return PRECISIONS[self.dtype].dtype

    def built_as(self) -> dict[str, Any]:
        """Return what transformers is told when it builds a model without weights."""
        return {"dtype": self.torch_dtype}

    def on_shards(self) -> Held:
        """Return how the part is held that a process has of weights which are sharded over several."""
        return cast("Held", self)

    def gathered_as(self) -> torch.dtype | None:
        """Return what such weights are rounded to where they are made whole; None: they are as they are held."""
        return None

    def loaded_as(self, sketch: PreTrainedModel, device: torch.device | str) -> dict[str, Any]:
        """Return what transformers is told when it loads a model.

        Args:
            sketch: The model without its weights.
            device: Where it is going to be.
        """
        return {**self.built_as(), **self._placed(device)}

    def loaded_on(self, device: torch.device | str) -> torch.device:
        """Return where the weights come into memory first: one after the other on the device."""
        import torch

        return torch.device(device)

    def _placed(self, device: torch.device | str) -> dict[str, Any]:
        """Return what transformers is told of where weights are loaded: nothing where that is the host."""
        where = self.loaded_on(device)
        return {} if where.type == "cpu" else {"device_map": {"": where}}

    def lay_out(self, model: PreTrainedModel) -> None:
        """Give a model without weights the layers that it has when it is loaded.

        Raises:
            UserError: It has none for which there are such.
        """

    def lay_out_shards(self, model: PreTrainedModel) -> None:
        """Give a model of placeholders the layers that it has where its weights are sharded."""

    def settle(self, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
        """Return a model that was loaded, as it computes, on its device."""
        moved: PreTrainedModel = model.to(device)
        return moved

    def take_over(self, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
        """Return a model that was built with weights, as it would be if these had been loaded."""
        return self.settle(model.to(self.torch_dtype), device)

    def numbers_of(self, model: PreTrainedModel) -> int:
        """Return how many numbers all weights are."""
        return sum(parameter.numel() for parameter in model.parameters())

    def bytes_of(self, model: PreTrainedModel) -> int:
        """Return what all weights take, whether they are in memory or not."""
        return sum(self.tensor_bytes(parameter) for parameter in model.parameters())

    def tensor_bytes(self, weights: Tensor) -> int:
        """Return what a weight takes that is not quantized, whether it is in memory or not."""
        return weights.nbytes

    def bits_of(self, model: PreTrainedModel) -> dict[int, tuple[int, int]]:
        """Return by its identity what each weight of few bits takes, and its scales, whether in memory or not."""
        return {}

    def gradient_bytes(self, trained: Sequence[Tensor]) -> int:
        """Return what the gradients of the weights that train take."""
        return sum(parameter.nbytes for parameter in trained)

    def saved_bytes(self, moved: Iterable[Tensor]) -> int:
        """Return what a checkpoint holds of weights, in bytes."""
        return sum(parameter.nbytes for parameter in moved)


class Float32(HeldSettings):
    """Hold every weight in 32 bits."""

    type: Literal["float32"] = "float32"
    """How weights are held."""
    dtype: Literal["float32"] = "float32"


class Bfloat16(HeldSettings):
    """Hold every weight in bfloat16: for weights that do not train."""

    type: Literal["bfloat16"] = "bfloat16"
    """How weights are held."""
    dtype: Literal["bfloat16"] = "bfloat16"


class Split(HeldSettings):
    """Hold every weight in bfloat16, with the 16 bits that it lacks beside it: the optimizer steps on the whole value.

    The model computes with bfloat16 weights, and what is saved is float32.
    """

    type: Literal["split"] = "split"
    """How weights are held."""
    dtype: Literal["bfloat16"] = "bfloat16"
    gradients: Literal["float32", "bfloat16"] = "float32"
    """What gradients are added up in."""
    low_on_host: bool = False
    """Whether the low bits stay in the host's memory."""

    def on_shards(self) -> Held:
        """Return float32: what a model computes with is made of it when weights are made whole."""
        return FLOAT32

    def gathered_as(self) -> torch.dtype | None:
        """Return bfloat16."""
        return self.torch_dtype

    def loaded_as(self, sketch: PreTrainedModel, device: torch.device | str) -> dict[str, Any]:
        """Return what transformers is told: what is in the files is rounded here alone."""
        return {**FLOAT32.built_as(), **self._placed(device)}

    def loaded_on(self, device: torch.device | str) -> torch.device:
        """Return where the weights come into memory first: the host, where half of each stays there."""
        return super().loaded_on("cpu" if self.low_on_host else device)

    def settle(self, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
        """Return a model whose weights are split, on its device."""
        from dpo_cli.modeling.split import split_weights

        split_weights(model, device, PRECISIONS[self.gradients].dtype, low_on_host=self.low_on_host)
        moved: PreTrainedModel = model.to(device)
        return moved

    def take_over(self, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
        """Return a model that was built with weights, as it would be if these had been loaded."""
        return self.settle(model, device)

    def tensor_bytes(self, weights: Tensor) -> int:
        """Return what a weight takes on the device, whether it is in memory or not."""
        return (2 if self.low_on_host else 4) * weights.numel()

    def gradient_bytes(self, trained: Sequence[Tensor]) -> int:
        """Return what the gradients of the weights that train take."""
        return sum(parameter.numel() for parameter in trained) * PRECISIONS[self.gradients].dtype.itemsize

    def saved_bytes(self, moved: Iterable[Tensor]) -> int:
        """Return what a checkpoint holds of weights: their whole values."""
        return sum(4 * parameter.numel() for parameter in moved)


class Float16(HeldSettings):
    """Hold every weight in float16: for weights that do not train."""

    type: Literal["float16"] = "float16"
    """How weights are held."""
    dtype: Literal["float16"] = "float16"


class QuantizedSettings(HeldSettings):
    """Hold the matrices of linear layers in few bits, and embeddings, head and all else in the dtype.

    What few bits stand for is multiplied in that dtype as well. None of it trains.
    """

    type: str
    quantized: ClassVar[bool] = True

    def __str__(self) -> str:
        """Name the way."""
        return self.type

    def layers(self) -> BitsAndBytesConfig:
        """Return how transformers makes the layers."""
        raise NotImplementedError

    def loaded_as(self, sketch: PreTrainedModel, device: torch.device | str) -> dict[str, Any]:
        """Return what transformers is told: each matrix is quantized on the device as it is read."""
        from dpo_cli.modeling.planned_sizes import kept_in_dtype

        layers = self.layers()
        layers.llm_int8_skip_modules = kept_in_dtype(sketch)
        return {**self.built_as(), "quantization_config": layers, "device_map": {"": self.loaded_on(device)}}

    def lay_out(self, model: PreTrainedModel) -> None:
        """Give a model without weights quantized layers.

        Raises:
            UserError: It has no layers for which there are such.
        """
        from dpo_cli.modeling import quantized_layers

        quantized_layers.lay_out(model, self.layers())
        self.settle(model, "meta")

    def lay_out_shards(self, model: PreTrainedModel) -> None:
        """Let the quantized layers of a model of placeholders have bits that can be sharded."""
        from dpo_cli.modeling import quantized_shards

        quantized_shards.lay_out(model, self.layers())

    def settle(self, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
        """Return a model that computes as it should, without the marks that quantizing leaves in its settings."""
        from dpo_cli.modeling import quantized_layers

        quantized_layers.settle(model, self.torch_dtype)
        model.hf_quantizer = None
        for part in (model.config, model.config.get_text_config()):
            for mark in ("quantization_config", "_is_quantized"):
                vars(part).pop(mark, None)
        # What PEFT looks at.
        setattr(model, f"is_loaded_in_{self._bits}bit", True)
        return model

    def take_over(self, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
        """Return a model that was built with weights, quantized."""
        from dpo_cli.modeling import quantized_layers

        moved: PreTrainedModel = model.to(self.torch_dtype).to(device)
        quantized_layers.quantize(moved, self.layers())
        return self.settle(moved, device)

    @property
    def _bits(self) -> int:
        """How many a quantized weight has."""
        return 4 if self.layers().load_in_4bit else 8

    def numbers_of(self, model: PreTrainedModel) -> int:
        """Return how many numbers all weights are, whatever each of them takes."""
        from dpo_cli.modeling.quantized_layers import held_numbers

        return held_numbers(model)

    def bytes_of(self, model: PreTrainedModel) -> int:
        """Return what all weights take with their scales, whether they are in memory or not."""
        from dpo_cli.modeling.quantized_layers import held_bytes

        return held_bytes(model)

    def bits_of(self, model: PreTrainedModel) -> dict[int, tuple[int, int]]:
        """Return by its identity what each weight of few bits takes, and its scales, whether in memory or not."""
        from dpo_cli.modeling.quantized_layers import planned_bits, quantized_layers

        return {id(layer.weight): planned_bits(layer) for layer in quantized_layers(model).values()}


class Nf4(QuantizedSettings):
    """Hold matrices in 4 bits a weight and a scale for 64 of them, which has 8 bits itself.

    Source: Dettmers et al. 2023, arXiv 2305.14314.
    """

    type: Literal["nf4"] = "nf4"
    """How weights are held."""

    def layers(self) -> BitsAndBytesConfig:
        """Return how transformers makes the layers."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.torch_dtype,
        )


class Int8(QuantizedSettings):
    """Hold matrices in 8 bits a weight and a scale for each row. Source: Dettmers et al. 2022, arXiv 2208.07339."""

    type: Literal["int8"] = "int8"
    """How weights are held."""

    def layers(self) -> BitsAndBytesConfig:
        """Return how transformers makes the layers."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


FLOAT32 = Float32()

Held = Float32 | Split | Bfloat16 | Float16 | Nf4 | Int8
"""The closed union of all ways to hold weights, told apart by `type`."""

WEIGHTS = tuple(one.model_fields["type"].default for one in (Float32, Split, Bfloat16))
"""The ways that `model.weights` chooses among."""

QUANTIZED = tuple(one.model_fields["type"].default for one in get_args(Held) if issubclass(one, QuantizedSettings))
"""The ways that `model.quantize` chooses among."""


def held_as(name: str, dtype: str) -> Held:
    """Return the way of that name.

    Args:
        name: Its type.
        dtype: The dtype of what is not quantized, where a part is.
    """
    way = next(one for one in get_args(Held) if one.model_fields["type"].default == name)
    found: Held = way(dtype=dtype)
    return found
