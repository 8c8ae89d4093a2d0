"""What is sent to a device is what was packed, in one buffer whose parts begin where kernels want them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.sending import ALIGNED_BYTES, Parcel, sent, with_tensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inner:
    name: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Outer:
    first: torch.Tensor
    inner: Inner
    several: tuple[Inner, ...]
    named: dict[int | None, torch.Tensor]
    none: torch.Tensor | None
    numbers: tuple[int, ...]


def tensors_of(value):
    found = []
    with_tensors(value, found.append)
    return found


TENSORS = st.builds(
    lambda shape, dtype: (torch.arange(int(np.prod(shape)), dtype=torch.int64) % 7).to(dtype).reshape(shape),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.uint8]),
)


@given(st.lists(TENSORS, min_size=6, max_size=6))
def test_values_types_and_shapes_arrive_from_an_aligned_buffer_of_which_all_are_views(tensors):
    first, *others = tensors
    inner = [Inner(str(place), tensor) for place, tensor in enumerate(others[:3])]
    value = Outer(first, inner[0], tuple(inner[1:]), {None: others[3], 4: others[4]}, None, (1, 2))
    parcel = Parcel.of(value, pinned=False)
    arrived = parcel.to(CPU)
    assert (arrived.none, arrived.numbers, arrived.inner.name) == (None, (1, 2), "0")
    found = tensors_of(arrived)
    assert len(found) == 6
    for tensor, expected in zip(found, tensors_of(value), strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
        assert tensor.storage_offset() * tensor.itemsize % ALIGNED_BYTES == 0
        assert tensor.untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_of_a_batch_is_sent_and_nothing_else_changes(name):
    ids = np.arange(4, dtype=np.int32)
    pairs = [TokenizedPair(ids, ids[:3], ids[1:], "f:1", 2.0, 0.5), TokenizedPair(ids[:2], ids, ids[:1], "f:2")]
    batch = LAYOUTS[name].batch([5, 7], pairs)
    arrived = Parcel.of(batch, pinned=False).to(CPU)
    on_its_way = tensors_of(arrived)
    assert len({tensor.untyped_storage().data_ptr() for tensor in on_its_way}) == 1
    assert all(torch.equal(*both) for both in zip(on_its_way, tensors_of(batch), strict=True))
    assert (arrived.pairs, arrived.lengths, arrived.num_tokens) == ((5, 7), batch.lengths, batch.num_tokens)
    every = [getattr(arrived, field.name) for field in dataclasses.fields(arrived)]
    assert all(any(tensor is one for one in on_its_way) for tensor in every if isinstance(tensor, torch.Tensor))


def test_nothing_is_copied_on_a_cpu():
    value = Inner("x", torch.ones(3))
    assert sent(value, CPU) is value
