"""Packed is padded, on tiny models of every architecture that can be packed; the others fall back and train."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import KINDS, build, example_pairs
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from write_layouts_page import PAGE, page

from dpo_cli.config import Config
from dpo_cli.data.prepared.step_plan import PairSizes
from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.kernels import PIECES, Pieces
from dpo_cli.modeling.attention.trees import TREE_ATTENTION, CannotPack
from dpo_cli.modeling.digests import weights_digest
from dpo_cli.modeling.folders.saving import saved_model
from dpo_cli.modeling.layouts import LAYOUTS, Packed, Padded
from dpo_cli.modeling.placement import placement_for
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.proof import Proof, prove
from dpo_cli.modeling.scorer import Scorer, model_inputs, recompute_activations
from dpo_cli.pipeline.models import choose_layout
from dpo_cli.pipeline.session import Session
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.losses.base import StepInfo
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.scoring import score_pairs
from dpo_cli.system.signals import StopSignals
from dpo_cli.training.ranks import Progress
from tests.conftest import make_config, read_metrics

FALLING_BACK = {
    "falcon": "its attention cannot be replaced",
    "bloom": "its attention cannot be replaced",
    "mpt": "its attention cannot be replaced",
    "mamba": "its attention cannot be replaced",
    "stablelm": "its attention cannot be replaced",
    "qwen3_next": "its attention cannot be replaced",
    "gpt_oss": "its attention has sinks",
    "lfm2": "log-probabilities differ by",
}
PACKED = [name for name in KINDS if name not in FALLING_BACK]
PAIRS = example_pairs()
FACTS = StepInfo(len(PAIRS), sum(len(pair.chosen) for pair in PAIRS))


def fixed_reference(batch):
    """A reference that is not the policy, so that losses and gradients of pairs differ."""
    return torch.linspace(-3, -6, len(batch.targets))


def answers(model, layout):
    """Return token log-probabilities, losses, metrics and gradients of the example pairs."""
    batch = LAYOUTS[layout].batch(range(len(PAIRS)), PAIRS)
    with torch.no_grad():
        tokens = Scorer(model)(batch)
    pairs, values = score_pairs(Scorer(model), Objective.of(DPO()), fixed_reference, batch, FACTS)
    model.zero_grad(set_to_none=True)
    pairs.losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tokens, pairs.losses.detach(), values, gradients


def packed(model):
    Packed().prepare(model)
    return model


def packed_tokens(model):
    batch = Packed().batch(range(len(PAIRS)), PAIRS)
    with torch.no_grad():
        return Scorer(packed(model))(batch)


def size_of(gradients, kind, name):
    """Return what a difference in a gradient is measured by: its norm.

    Where keys carry no position, a bias on all of them moves every score of a query alike, and softmax does not see
    it. Such a gradient is zero; what is found in its place is the rounding of terms as large as the weight's gradient.
    """
    if kind == "opt" and name.endswith("k_proj.bias"):
        name = name.replace("bias", "weight")
    return gradients[name].norm()


@pytest.mark.parametrize("kind", PACKED)
def test_log_probabilities_loss_metrics_and_every_gradient_are_those_of_the_padded_layout(kind):
    tokens, losses, values, gradients = answers(build(kind), "padded")
    packed_tokens, packed_losses, packed_values, packed_gradients = answers(packed(build(kind)), "packed")
    torch.testing.assert_close(packed_tokens, tokens, rtol=0, atol=2e-5)
    torch.testing.assert_close(packed_losses, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_values, values, rtol=1e-5, atol=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (packed_gradients[name] - gradient).norm()
        assert difference <= 1e-5 * size_of(gradients, kind, name), name


@pytest.mark.parametrize(("kind", "feature"), [(kind, feature) for kind in PACKED for feature in KINDS[kind].without])
def test_what_an_architecture_adds_to_attention_moves_the_packed_answers(kind, feature):
    """Else the models would be equal by accident: because nothing of what could go wrong comes into play."""
    plain = build(kind, **KINDS[kind].without[feature])
    assert (packed_tokens(plain) - packed_tokens(build(kind))).abs().max() > 0.2


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_recomputed_activations_change_nothing(kind):
    _, _, values, gradients = answers(packed(build(kind)), "packed")
    model = packed(build(kind))
    recompute_activations(model)
    _, _, found, recomputed = answers(model, "packed")
    torch.testing.assert_close(found, values, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-5)


class Held:
    """Pairs in memory, as the pipeline asks for them."""

    def __init__(self, pairs):
        self.pairs = pairs
        counts = [[len(part) for part in (pair.prompt, pair.chosen, pair.rejected, pair.chosen)] for pair in pairs]
        self.sizes = PairSizes(*np.array(counts).T, np.arange(len(pairs)))

    def __getitem__(self, index):
        return self.pairs[index]


def choose(model, layout, attention="auto"):
    """Choose a layout as a run does; return it with all that was said."""
    said, warned = [], []
    console = SimpleNamespace(notice=said.append, warning=warned.append)
    config = Config(model="m", training={"layout": layout, "attention": attention})
    accelerator = Accelerator(cpu=True)
    session = Session(config, console, StopSignals(), accelerator, Progress(), placement_for(accelerator))
    chosen, _ = choose_layout(session, [Policy(model)], Held(PAIRS), np.arange(len(PAIRS)), trained=True)
    return chosen, said, warned


@pytest.mark.parametrize("kind", FALLING_BACK)
def test_what_cannot_be_packed_says_why_falls_back_answers_as_before_and_trains(kind):
    model = build(kind)
    attention, before = model.config._attn_implementation, answers(model, "padded")
    model.zero_grad(set_to_none=True)
    chosen, said, warned = choose(model, "auto")
    assert isinstance(chosen, Padded)
    assert not said
    (line,) = warned
    assert FALLING_BACK[kind] in line
    assert "\n" not in line
    assert model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())
    after = answers(model, "padded")
    assert all(torch.equal(now, then) for now, then in zip(after[:3], before[:3], strict=True))

    batch = chosen.batch(range(len(PAIRS)), PAIRS)
    with torch.no_grad():
        reference = Scorer(model)(batch)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        pairs, _ = score_pairs(Scorer(model), Objective.of(DPO()), lambda batch: reference, batch, FACTS)
        pairs.losses.mean().backward()
        optimizer.step()
        losses.append(float(pairs.losses.detach().mean()))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", ["falcon", "bloom", "mamba", "gpt_oss", "lfm2"])
def test_what_cannot_be_packed_is_refused_where_that_was_asked_for_by_name(kind):
    with pytest.raises(UserError, match=FALLING_BACK[kind]) as refused:
        choose(build(kind), "packed")
    assert "layout: auto" in refused.value.hint


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt"])
def test_what_can_be_packed_is_packed_and_the_proof_says_how_near_it_is(kind):
    chosen, said, warned = choose(build(kind), "auto")
    assert isinstance(chosen, Packed)
    assert not warned
    assert said[0].startswith("checked: packed gives the same as padded")


def test_a_window_that_only_the_longer_pairs_reach_is_proved_as_well(monkeypatch):
    """The packed attention is made to look back without end; the shortest pairs cannot tell."""
    from dpo_cli.modeling.attention import pieces as attention

    lengths = sorted(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in PAIRS)
    window = lengths[-1] - 6
    assert window > lengths[0]

    class Endless(attention.PieceMask):
        def __init__(self, stretches, window):
            super().__init__(stretches, None)

    monkeypatch.setattr(attention, "PieceMask", Endless)
    chosen, _, (line,) = choose(build("mistral", sliding_window=window), "auto")
    assert isinstance(chosen, Padded)
    assert "log-probabilities differ" in line


def test_a_proof_fails_on_what_is_not_a_number_and_on_a_gradient_alone():
    assert Proof(math.nan, 0.0).fails(PRECISIONS["float32"])
    assert Proof(0.0, math.nan).fails(PRECISIONS["float32"])
    assert "gradient" in Proof(0.0, 0.01).fails(PRECISIONS["float32"])
    assert not Proof(0.0, 0.0).fails(PRECISIONS["float32"])


def test_a_refusal_in_the_middle_of_the_gradient_leaves_no_gradient(monkeypatch):
    from dpo_cli.modeling.attention import pieces as attention

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no backward pass\nhere")

    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *arguments: Breaks.apply(attend(*arguments)))
    model = build("llama")
    proof = prove(Scorer(model), Packed(), PAIRS, PRECISIONS["float32"])
    assert proof.fails(PRECISIONS["float32"]) == "it fails on packed pairs, RuntimeError: no backward pass"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_packing_leaves_no_trace_in_what_is_saved_nor_in_the_digest(kind, tmp_path, tokenizer):
    model = build(kind)
    digest, attention = weights_digest(model), model.config._attn_implementation
    expected = packed_tokens(model)
    assert model.config._attn_implementation == TREE_ATTENTION
    assert weights_digest(model) == digest
    with saved_model(tmp_path / "final", model, tokenizer, "saving"):
        pass
    assert TREE_ATTENTION not in (tmp_path / "final" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.config._attn_implementation == attention
    with torch.no_grad():
        found = Scorer(loaded)(Padded().batch(range(len(PAIRS)), PAIRS))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_page_on_layouts_is_what_the_proof_finds():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make generated`"


@pytest.fixture
def bloom_config(tmp_path, tokenizer, pairs_file):
    """A run of two steps on a tiny BLOOM, whose attention knows its tokens' distances by a bias."""
    folder = tmp_path / "bloom"
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    build("bloom", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = {"max_steps": 2, "learning_rate": 1e-5}
    return functools.partial(make_config, tmp_path, folder, pairs_file, training=training, data={"eval": 0.1})


def test_a_run_that_cannot_be_packed_says_so_once_and_finishes(forked_dpo, bloom_config, tmp_path):
    result = forked_dpo("train", "--config", bloom_config())
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning") == 1
    assert result.stderr.count("using the padded layout") == 1
    run = tmp_path / "runs" / "run"
    assert read_metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    written = json.loads((run / "final" / "config.json").read_text())
    assert TREE_ATTENTION not in json.dumps(written)
    assert written["architectures"] == ["BloomForCausalLM"]
    AutoModelForCausalLM.from_pretrained(run / "final")


def test_a_run_that_asks_for_what_cannot_be_packed_ends_with_a_hint(forked_dpo, bloom_config, tmp_path):
    result = forked_dpo("train", "--config", bloom_config(), "training.layout=packed")
    assert result.returncode == 2
    assert "BloomForCausalLM: its attention cannot be replaced" in result.stderr
    assert "hint: set `training.layout: auto`" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_what_is_scored_before_padding_is_the_same(kind):
    """On a GPU the padded layout hands over no mask."""
    model, batch = build(kind), LAYOUTS["padded"].batch(range(len(PAIRS)), PAIRS)
    assert not batch.attention_mask.all()
    with torch.no_grad():
        masked, plain = (
            model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)[batch.positions]
            for mask in (batch.attention_mask, None)
        )
    torch.testing.assert_close(plain.log_softmax(-1), masked.log_softmax(-1), rtol=0, atol=5e-5)


def test_the_padded_layout_hands_over_its_mask_on_a_cpu_and_none_on_a_gpu():
    batch = LAYOUTS["padded"].batch(range(len(PAIRS)), PAIRS)
    assert model_inputs(batch)["attention_mask"] is batch.attention_mask
    with FakeTensorMode():
        sent = dataclasses.replace(batch, input_ids=torch.empty(batch.input_ids.shape, dtype=torch.long, device="cuda"))
    assert model_inputs(sent)["attention_mask"] is None


def failing(*failures):
    """Return kernels that refuse every row, one for each failure, and the pieces that read them."""

    def kernel(name, failure):
        class Refusing(Pieces):
            def mask(self, *_):
                raise failure

        Refusing.name = name
        return Refusing()

    return [*(kernel(name, failure) for name, failure in failures), PIECES]


@pytest.mark.parametrize(
    "failure",
    [CannotPack("its scores have a soft cap"), RuntimeError("No valid triton configs. OutOfResources: shared memory")],
)
def test_where_a_kernel_fails_the_next_one_is_proved_and_named(failure, monkeypatch):
    kernels = failing(("flex", failure))
    monkeypatch.setattr("dpo_cli.pipeline.models.kernels_for", lambda asked, device: kernels)
    chosen, said, (warned,) = choose(build("llama"), "auto")
    assert chosen == Packed(PIECES, (None,))
    assert warned.startswith("trying packed, since packed (flex attention) cannot be used with this model (Llama")
    assert str(failure) in warned
    assert said[0].startswith("checked: packed gives the same as padded")


def test_where_all_kernels_fail_the_padded_layout_is_used(monkeypatch):
    kernels = failing(("flex", CannotPack("one")), ("varlen", CannotPack("other")))[:2]
    monkeypatch.setattr("dpo_cli.pipeline.models.kernels_for", lambda asked, device: kernels)
    chosen, _, (first, second) = choose(build("llama"), "auto")
    assert isinstance(chosen, Padded)
    assert "one" in first
    assert "using the padded layout, since the packed (varlen attention) one is not exact" in second


def test_attention_that_was_asked_for_and_cannot_be_used_stops_the_run():
    with pytest.raises(UserError, match=r"`pieces` attention cannot be used .*sinks") as refused:
        choose(build("gpt_oss"), "auto", "pieces")
    assert refused.value.where == "`training.attention: pieces`"
    assert "attention: auto" in refused.value.hint
