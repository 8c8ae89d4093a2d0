"""A digest of weights is that of their bits, and the same for a tensor as a whole and in parts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Glm4MoeConfig

from dpo_cli.modeling.digests import _ROW, bit_sums, tensors_digest, weights_digest

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _drawn(dtype: torch.dtype, size: int, seed: int = 0) -> torch.Tensor:
    bits = torch.randint(0, 256, (size * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(dtype) if dtype != torch.bool else bits[:size] > 127


def _flipped(tensor: torch.Tensor, element: int, bit: int) -> torch.Tensor:
    other = tensor.clone()
    bits = other.view(_BITS[tensor.dtype.itemsize])
    top = bit == 8 * tensor.dtype.itemsize - 1 and tensor.dtype.itemsize > 1
    bits[element] ^= -(2**bit) if top else 2**bit
    return other


@given(
    dtype=st.sampled_from(_DTYPES),
    size=st.integers(0, 3000),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    seed=st.integers(0, 99),
)
def test_the_sums_of_parts_add_up_to_those_of_the_whole(dtype: Any, size: int, cuts: list[float], seed: int) -> None:
    whole = _drawn(dtype, size, seed)
    edges = [0, *sorted(int(cut * size) for cut in cuts), size]
    parts = [bit_sums(whole[a:b].clone(), a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(sum(parts, torch.zeros(2, dtype=torch.int64)), bit_sums(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_parts_of_a_large_tensor_add_up_wherever_they_are_cut(dtype: torch.dtype) -> None:
    whole = _drawn(dtype, 70 * _ROW + 17)
    for cut in (1, 5, _ROW - 1, _ROW, 2 * _ROW + 3, 33 * _ROW + 7):
        assert torch.equal(bit_sums(whole[:cut]) + bit_sums(whole[cut:], cut), bit_sums(whole))


def test_sums_are_those_of_the_definition() -> None:
    """Σ unit · row factor · unit factor mod 2⁶⁴, by Python's own integers, with factors of SplitMix64 written anew."""
    size, most = 3 * _ROW + 5, 2**64

    def mixed(index: int) -> int:
        x = (index + 1) * 0x9E3779B97F4A7C15 % most
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % most
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % most
        return x ^ (x >> 31)

    whole = _drawn(torch.float32, size)
    units, factors = whole.view(torch.int32).tolist(), [mixed(place) for place in range(_ROW)]
    expected = []
    for shift in (0, 31):
        total = 0
        for index, unit in enumerate(units):
            row, place = divmod(index, _ROW)
            total += unit * (mixed(2**48 + row) | 1) * ((factors[place] >> shift) | 1)
        expected.append(total % most)
    assert [one % most for one in bit_sums(whole).tolist()] == expected


@given(
    dtype=st.sampled_from(_DTYPES[:-1]),
    size=st.integers(1, 300),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.floats(0, 1, exclude_max=True),
)
def test_every_bit_counts(dtype: torch.dtype, size: int, place: float, bit: float) -> None:
    whole = _drawn(dtype, size)
    other = _flipped(whole, int(place * size), int(bit * 8 * dtype.itemsize))
    assert all(bit_sums(whole) != bit_sums(other))


@given(places=st.sets(st.integers(0, 299), min_size=2, max_size=6), dtype=st.sampled_from(_DTYPES[:3]))
def test_flipped_signs_do_not_make_up_for_each_other(places: set[int], dtype: torch.dtype) -> None:
    whole = _drawn(dtype, 300)
    other = whole.clone()
    for place in places:
        other = _flipped(other, place, 8 * dtype.itemsize - 1)
    assert bit_sums(whole).tolist() != bit_sums(other).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_count_and_not_values(dtype: torch.dtype) -> None:
    nan = torch.tensor([math.nan], dtype=dtype)
    pairs = [
        (torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype)),
        (nan, _flipped(nan, 0, 0)),
        (torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.tensor([1.0, 3.0, 2.0], dtype=dtype)),
    ]
    for one, other in pairs:
        assert tensors_digest({}, {"w": one}) != tensors_digest({}, {"w": other})
    assert tensors_digest({}, {"w": nan}) == tensors_digest({}, {"w": nan.clone()})


def test_names_dtypes_shapes_order_and_settings_count() -> None:
    one, other = _drawn(torch.float32, 24, 1).view(4, 6), _drawn(torch.float32, 24, 2).view(4, 6)
    digests = [
        tensors_digest({}, {"a": one, "b": other}),
        tensors_digest({}, {"a": other, "b": one}),
        tensors_digest({}, {"b": other, "a": one}),
        tensors_digest({}, {"a": one, "c": other}),
        tensors_digest({}, {"a": one.view(6, 4), "b": other}),
        tensors_digest({}, {"a": one.view(torch.int32), "b": other}),
        tensors_digest({}, {"a": one}),
        tensors_digest({"beta": 1}, {"a": one, "b": other}),
    ]
    assert len(set(digests)) == len(digests)


def test_weights_are_digested_as_if_they_were_held_in_another_dtype() -> None:
    weights, counts = torch.randn(3, _ROW // 2 + 1), torch.arange(5)
    rounded = tensors_digest({}, {"w": weights.bfloat16(), "n": counts})
    assert tensors_digest({}, {"w": weights, "n": counts}, torch.bfloat16) == rounded
    assert tensors_digest({}, {"w": weights, "n": counts}) != rounded


def test_weights_that_are_loaded_in_float32_whatever_the_dtype_are_digested_as_they_are(tmp_path: Path) -> None:
    """GLM-4.5 keeps the bias of its routers so, which transformers' own loading tells here."""
    config = Glm4MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.normal_()
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        held = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {tensor.dtype for tensor in held.state_dict().values()} == {dtype, torch.float32}
        assert weights_digest(model, dtype=dtype) == weights_digest(held) != weights_digest(model)


def test_where_the_bytes_lie_in_memory_does_not_count() -> None:
    wide = _drawn(torch.bfloat16, 64).view(8, 8)
    assert torch.equal(bit_sums(wide.t()), bit_sums(wide.t().contiguous()))
    shifted = torch.cat((wide.view(-1)[:1], wide.view(-1)))[1:]
    assert torch.equal(bit_sums(shifted), bit_sums(wide))
