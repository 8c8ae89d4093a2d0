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
}
"""How tensors are changed where one of the file becomes one of the model; others put experts together."""


@contextlib.contextmanager
def read_as(quantizer: type[GgufHfQuantizer]) -> Iterator[None]:
    """Let transformers read GGUF files with a class of its kind."""
    before = AUTO_QUANTIZER_MAPPING[_GGUF]
    AUTO_QUANTIZER_MAPPING[_GGUF] = quantizer
    try:
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
        from gguf import GGUFReader

        config = legacy.load_gguf_checkpoint(checkpoint_file)["config"]
        reader = GGUFReader(checkpoint_file)
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
        file = Path(checkpoint_file)
        return {names[one.name]: _Streamed(file, one, changed, self.dtype) for one in tensors if one.name in names}


class _Streamed(LazyGgufTensor):  # type: ignore[misc]
    """A tensor that is read when it is asked for; of a mapped file, its pages would stay in memory beside it."""

    def __init__(self, file: Path, tensor: ReaderTensor, processor: legacy.TensorProcessor, dtype: torch.dtype) -> None:
        super().__init__(tensor.data, tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))
        self._file, self._tensor, self._processor, self._dtype = file, tensor, processor, dtype

    def is_floating_point(self) -> bool:
        """Tell that it is made of floats, whatever the file has."""
        return True

    def __getitem__(self, index: Any) -> torch.Tensor:
        from gguf import dequantize

        held = self._tensor.data
        blocks = np.fromfile(self._file, held.dtype, held.size, offset=self._tensor.data_offset).reshape(held.shape)
        weights = dequantize(blocks, self._tensor.tensor_type)
        changed = self._processor.process(weights=weights, name=self._tensor.name).weights
        return torch.from_numpy(np.ascontiguousarray(changed)).to(self._dtype)
