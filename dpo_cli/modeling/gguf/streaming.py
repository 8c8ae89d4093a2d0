"""The tensors of a GGUF file are dequantized one at a time, where transformers would make all of them at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.integrations.gguf.reader import LazyGgufTensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PreTrainedModel

_GGUF = "gguf"
"""What transformers calls such files among its ways to quantize."""

_ONE_BY_ONE = {
    legacy.TensorProcessor,
    legacy.LlamaTensorProcessor,
    legacy.BloomTensorProcessor,
    legacy.MambaTensorProcessor,
    legacy.NemotronTensorProcessor,
    legacy.Gemma2TensorProcessor,
    legacy.Lfm2TensorProcessor,
    legacy.Qwen2MoeTensorProcessor,
    legacy.MiniMaxM2TensorProcessor,
}
"""How tensors are changed where each of the file is one of the model, or a part of one: gate and up of all experts."""

_ROWS = 1
"""The dimension of stacked experts that counts the rows of each."""


@contextlib.contextmanager
def read_as(quantizer: type[GgufHfQuantizer]) -> Iterator[None]:
    """Let transformers read GGUF files with a class of its kind, and fast."""
    from dpo_cli.modeling.gguf.reader import fast_reading

    before = AUTO_QUANTIZER_MAPPING[_GGUF]
    AUTO_QUANTIZER_MAPPING[_GGUF] = quantizer
    try:
        with fast_reading():
            yield
    finally:
        AUTO_QUANTIZER_MAPPING[_GGUF] = before


class Streaming(GgufHfQuantizer):  # type: ignore[misc]
    """Reads a GGUF file tensor by tensor, of whatever architecture transformers knows how."""

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Any]:
        """Return the tensors by their names in the model, none of them read yet."""
        if self.supported:
            found: dict[str, Any] = super().get_state_dict(checkpoint_file, model)
            return found
        from dpo_cli.modeling.gguf.reader import Reader

        config = legacy.load_gguf_checkpoint(checkpoint_file)["config"]
        reader = Reader(checkpoint_file)
        architecture = reader.fields["general.architecture"].contents()
        tensors = list(reader.tensors)
        # Of its vocabulary nothing is needed any more.
        del reader
        gc.collect()
        processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
        if processor not in _ONE_BY_ONE:
            whole: dict[str, Any] = super().get_state_dict(checkpoint_file, model)
            return whole
        changed = processor(config=config)
        names = legacy.get_gguf_hf_weights_map(model, changed)
        parts: dict[str, list[ReaderTensor]] = {}
        # In the order of their names: of what is one tensor in the model, gate comes before up.
        for one in sorted(tensors, key=lambda tensor: tensor.name):
            # Stacked experts have no module of their own in transformers, so that nothing is called `weight` there.
            if name := names.get(one.name) or names.get(one.name.removesuffix(".weight")):
                parts.setdefault(name, []).append(one)
        file = Path(checkpoint_file)
        return {name: _Streamed(file, of_it, changed, self.dtype) for name, of_it in parts.items()}


class _Streamed(LazyGgufTensor):  # type: ignore[misc]
    """A tensor that is read when it is asked for; of a mapped file, its pages would stay in memory beside it.

    Args:
        file: The file.
        parts: What it is made of: one tensor, or several that are joined along the rows of each expert.
        processor: How a tensor is changed.
        dtype: What it becomes.
    """

    def __init__(
        self, file: Path, parts: list[ReaderTensor], processor: legacy.TensorProcessor, dtype: torch.dtype
    ) -> None:
        shape = list(reversed(parts[0].shape.tolist()))
        if len(parts) > 1:
            shape[_ROWS] *= len(parts)
        super().__init__(parts[0].data, parts[0].tensor_type, tuple(shape))
        self._file, self._parts, self._processor, self._dtype = file, parts, processor, dtype

    def is_floating_point(self) -> bool:
        """Tell that it is made of floats, whatever the file has."""
        return True

    def __getitem__(self, index: Any) -> torch.Tensor:
        if len(self._parts) == 1:
            return self._read(self._parts[0])
        whole = torch.empty(self.shape, dtype=self._dtype)
        for place, part in zip(whole.chunk(len(self._parts), _ROWS), self._parts, strict=True):
            place.copy_(self._read(part))
        return whole

    def _read(self, tensor: ReaderTensor) -> torch.Tensor:
        """Return a tensor of the file as the model has it."""
        from gguf import dequantize

        held = tensor.data
        blocks = np.fromfile(self._file, held.dtype, held.size, offset=tensor.data_offset).reshape(held.shape)
        changed = self._processor.process(weights=dequantize(blocks, tensor.tensor_type), name=tensor.name).weights
        return torch.from_numpy(np.ascontiguousarray(changed)).to(self._dtype)
