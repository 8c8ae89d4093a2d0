"""Compiled decoder layers: the same numbers, one graph for rows of any length, an error where there would be many."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, example_pairs
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as theirs

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.attention import flex, varlen
from dpo_cli.modeling.attention.flex import compiled_flex
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.attention.trees import windows_of
from dpo_cli.modeling.compiled import compile_layers, decoder_layers, hardened, leave_uncompiled
from dpo_cli.modeling.layouts import PACKED, PADDED, Packed
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import Scorer, recompute_activations
from dpo_cli.training.ranks import Progress

# torch's compiler hides this warning of its own, except where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PAIRS = example_pairs()
RUN = [(1, True), (2, False), (3, True), (1, False), (2, True)]
"""Pairs of each pass of a run, and whether gradients are taken: proof, reference, steps, evaluation."""


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    """Let kernels of a GPU run here: FlexAttention's own check refuses gradients, and of the other there is none."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled_flex", lambda dtype: compiled_flex(dtype, "eager"))
    monkeypatch.setattr(varlen, "_COMPUTED_IN", (torch.float32,))
    yield
    torch._dynamo.reset()


def layout_of(name, model):
    return {"padded": PADDED, "pieces": PACKED}.get(name) or Packed(KERNELS[name], windows_of(model.config))


def passes(score, layout, run=RUN):
    """Return the log-probabilities of each pass, and the gradients of the last one that takes any."""
    found = []
    for count, grad in run:
        batch = layout.batch(range(count), PAIRS[:count])
        with torch.set_grad_enabled(grad):
            found.append(score(batch))
        if grad:
            score.zero_grad(set_to_none=True)
            found[-1].sum().backward()
    return [logps.detach() for logps in found], {
        name: weight.grad for name, weight in score.named_parameters() if weight.grad is not None
    }


def compared(kind, name, *, recomputed=False, backend="eager"):
    """Compare a model with compiled layers with the same as it is; return how many frames were compiled."""
    models = [build(kind) for _ in range(2)]
    for model in models:
        PACKED.prepare(model) if name != "padded" else None
        if recomputed:
            recompute_activations(model)
    plain, compiled = map(Scorer, models)
    layout = layout_of(name, models[0])
    expected, gradients = passes(plain, PACKED if name in KERNELS else layout)
    counters.clear()
    assert compile_layers(compiled.policy, backend) == 2
    found, others = passes(compiled, layout)
    for ours, own in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-5)
    for weight, gradient in gradients.items():
        assert (others[weight] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6, weight
    return counters["frames"]["ok"]


@pytest.mark.parametrize(
    ("kind", "name", "frames", "recomputed"),
    [
        ("llama", "padded", 2, False),
        ("llama", "padded", 2, True),
        ("llama", "flex", 2, False),
        ("llama", "flex", 2, True),
        ("gemma2", "flex", 4, False),
        pytest.param("gemma2", "flex", 4, True, marks=pytest.mark.slow),
    ],
)
def test_a_kind_of_layers_has_one_graph_with_and_one_without_gradient_for_all_lengths(kind, name, frames, recomputed):
    # Of a soft cap that is computed again only a backend that makes graphs of gradients itself knows what to keep.
    backend = "aot_eager" if recomputed and kind == "gemma2" else "eager"
    # The first frame of a process may be compiled once more.
    assert frames <= compared(kind, name, recomputed=recomputed, backend=backend) <= frames + 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_around_pieces_which_are_others_in_every_row_the_rest_of_a_layer_is_compiled():
    """Its parts before and behind attention, with and without gradient, for the first layer and the others."""
    assert compared("llama", "pieces") <= 16


def test_attention_with_gathered_keys_is_part_of_the_graph(monkeypatch):
    """What stands in for the kernel is traced as torch's operator is; its numbers are others."""

    def stand_in(query, key, value, *_starts, **_options):
        return query + key.sum() + value.sum()

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    model = build("llama")
    PACKED.prepare(model)
    compile_layers(model, "eager")
    passes(Scorer(model), layout_of("varlen", model))
    assert counters["frames"]["ok"] == 2
    assert not counters["graph_break"]


def test_watching_the_ranks_compiles_nothing_anew():
    """The failure detector has no hook in any layer."""
    model = build("llama")
    PACKED.prepare(model)
    compile_layers(model, "eager")
    score, layout = Scorer(model), layout_of("flex", model)
    passes(score, layout)
    before = counters["frames"]["ok"]
    progress = Progress()
    steps = progress.following(iter(range(3)), 0)
    for _ in steps:
        passes(score, layout)
    assert progress.step == 3
    assert counters["frames"]["ok"] == before


def test_an_adapter_trains_in_compiled_layers_and_is_left_out_before_step_1():
    policy = Policy(build("llama"), Adapted(Lora(rank=4, dropout=0.1), 0, "tiny"))
    policy.read(PACKED)
    layout, plain = layout_of("flex", policy.model), Scorer(policy.model)
    batch = layout.batch(range(3), PAIRS[:3])
    with torch.no_grad():
        expected = plain(batch)
    compile_layers(policy.model, "eager")
    for _ in range(2):
        for count, grad in RUN:
            some = layout.batch(range(count), PAIRS[:count])
            with torch.set_grad_enabled(grad):
                if grad:
                    with policy.weights.training_pass():
                        plain(some).sum().backward()
                else:
                    plain(some)
        with policy.weights.at_beginning(), torch.no_grad():
            torch.testing.assert_close(plain(batch), expected, rtol=1e-5, atol=2e-5)
    assert all(weight.grad is not None for weight in policy.weights.trained())
    assert counters["frames"]["ok"] <= 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_load_of_experts_is_counted_in_compiled_layers(kind):
    plain, compiled = (Scorer(build(kind)) for _ in range(2))
    for score in (plain, compiled):
        PACKED.prepare(score.policy)
    batch = PACKED.batch(range(3), PAIRS[:3])
    compile_layers(compiled.policy, "eager")
    with torch.no_grad():
        for ours, own in zip(compiled(batch, with_load=True), plain(batch, with_load=True), strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-5)


def test_what_each_pass_needs_compiled_anew_is_an_error_that_names_the_cause():
    by_number = hardened(torch.compile(lambda x, kind: x * len(kind), dynamic=True, backend="eager"), "a decoder layer")
    with pytest.raises(UserError, match="torch compiled a decoder layer 8 times") as caught:
        for number in range(20):
            by_number(torch.ones(3), "x" * number)
    assert "kind" in caught.value.where


def test_layers_within_layers_are_compiled_as_part_of_them_and_none_stays_compiled_that_is_left():
    model = build("llama")
    layers = decoder_layers(model)
    assert layers == list(model.base_model.layers)
    compile_layers(model, "eager")
    assert all(layer._compiled_call_impl for layer in layers)
    leave_uncompiled(model)
    assert not any(layer._compiled_call_impl for layer in layers)
    assert not decoder_layers(nn.Sequential(nn.Linear(2, 2)))
