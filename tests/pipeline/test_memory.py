"""What a run is estimated to take whatever its pairs are, and what is suggested where that is too much."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import types

import pytest
import torch
from tiny_models import build

from dpo_cli.config import as_config, load_config
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.held import held_as
from dpo_cli.modeling.memory import MemoryEstimate
from dpo_cli.modeling.planned_sizes import sizes_under_lora
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline import memory
from dpo_cli.pipeline.memory import check_memory
from dpo_cli.pipeline.models import trained_policy
from dpo_cli.pipeline.plan import planned
from dpo_cli.pipeline.session import started
from dpo_cli.pipeline.settling import settled_on_paper
from dpo_cli.reporting.console import Console
from dpo_cli.training.run_folder import RunFolder
from tests.conftest import make_config

RANK = 2
SIZES = {"vocab_size": 400, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    build("llama", **SIZES, **HEADS).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def numbers(model):
    """Return how many weights the model has, by its own count, and how many a LoRA of `RANK` on all linear layers.

    Each layer has q, o of 256 → 256, k, v of 256 → 128, gate, up of 256 → 512 and down of 512 → 256.
    """
    of_layer = 2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512)
    return Policy.empty(str(model)).model.num_parameters(), 2 * RANK * of_layer


@pytest.fixture
def session(tmp_path, model, pairs_file):
    """Open a session under some settings."""
    opened = []

    def open_one(**settings):
        config = load_config(make_config(tmp_path, model, pairs_file, **settings))
        opened.append(started(config, Console(quiet=True)))
        return opened[-1].__enter__()

    yield open_one
    for one in opened:
        one.__exit__(None, None, None)


LORA = {"type": "lora", "rank": RANK}
SPLIT = {"weights": "split"}
SYNCED = {"type": "synced", "every_steps": 2}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("reference", "copies"), [("cached", 0), ("frozen", 0), (SYNCED, 1)], ids=str)
@pytest.mark.parametrize("started_from", [False, True], ids=["fresh", "start"])
def test_an_adapter_takes_gradients_moments_and_copies_of_its_own_weights_alone(
    session, model, tmp_path, tokenizer, reference, copies, started_from, background
):
    """Beside the base: 4 bytes for a weight, 4 for its gradient, 8 for AdamW; a start adapter that answers is a copy.

    What is saved in the background is the adapter, its moments and a reference that moves.
    """
    base, adapter = numbers(model)
    lora = dict(LORA)
    if started_from:
        lora["start"] = str(tmp_path / "start")
        (tmp_path / "start").mkdir()
        with started(load_config(make_config(tmp_path, model, model, adapter=LORA)), Console(quiet=True)) as first:
            trained_policy(first).weights.write(tmp_path / "start", tokenizer)
        copies = copies or int(reference == "frozen")
    one = session(adapter=lora, reference=reference, checkpoints={"background": background})
    policy = trained_policy(one, empty=True)
    parts = memory._without_passes(one, policy.sizes(), policy.weights.trained(), policy, 0).parts()
    assert {name: size for name, size in parts.items() if name != "optimizer"} == {
        "program and libraries": 0,
        "weights": 4 * (base + adapter),
        "reference model": 4 * adapter * copies,
        "gradients": 4 * adapter,
        "activations": 0,
        "logits": 0,
        "gradients being averaged": 0,
        "gathered from other processes": 0,
        "gaps between tensors": 0,
        "copy being saved": background * (4 * adapter * (1 + (reference == SYNCED)) + parts["optimizer"]),
    }
    # AdamW counts the steps of every weight beside the moments of its numbers.
    assert parts["optimizer"] == pytest.approx(8 * adapter, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "bytes_of", "hint"),
    [
        ({}, lambda base, adapter: 12 * base, "set `training.optimizer: adafactor`"),
        ({}, lambda base, adapter: 4 * base + 17 * 8 * adapter, "set `adapter: lora`"),
        ({"checkpoints": {"background": True}}, lambda base, adapter: 17 * base, "set `checkpoints.background: false`"),
        ({"reference": "frozen"}, lambda base, adapter: 17 * base, "set `reference.type: cached`"),
        ({"reference": "frozen"}, lambda base, adapter: 4 * base + 17 * 8 * adapter, "set `adapter: lora`"),
        ({}, lambda base, adapter: 2 * base + 17 * 8 * adapter, "set `adapter: lora` and `model.quantize: nf4`"),
        ({"adapter": LORA}, lambda base, adapter: 2 * base + 17 * adapter, "set `model.quantize: nf4`"),
        ({"model": SPLIT}, lambda base, adapter: 9 * base, "set `training.optimizer: adafactor`"),
        (
            {"model": SPLIT},
            lambda base, adapter: 4 * base + 17 * 8 * adapter,
            "set `adapter: lora` and `model.weights: auto`",
        ),
    ],
    ids=[
        "adafactor",
        "adapter",
        "background",
        "cached",
        "an adapter instead of all others",
        "quantized",
        "more",
        "split",
        "an adapter instead",
    ],
)
def test_what_does_not_fit_is_refused_with_the_least_change_that_would(
    session, model, monkeypatch, settings, bytes_of, hint
):
    """All weights take 16 bytes each, a reference 4 and a copy 12 more; the adapter that is suggested has rank 16.

    In 4 bits, half a byte each and their scales: less than 2 bytes also with the embeddings, which keep 4.
    """
    one = session(**settings)
    policy, free = trained_policy(one, empty=True), bytes_of(*numbers(model))
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with pytest.raises(UserError) as refused:
        check_memory(one, policy, policy, 0)
    (first, _), *others = suggested(refused.value.hint)
    assert " and ".join(f"`{setting}`" for setting in first) == hint.removeprefix("set ")
    for together, peak in [(first, None), *others]:
        exact = least(one, together)
        assert exact <= free
        assert peak is None or peak == pytest.approx(exact / 2**30, abs=0.006)


def suggested(hint):
    """Return the settings that a hint names together, and the GiB that they are said to take."""
    named = re.findall(r"((?:`[^`]+`(?: and )?)+) \((\S+) GiB\)", hint)
    return [(re.findall("`([^`]+)`", settings), float(peak)) for settings, peak in named]


def least(one, settings):
    """Return what a run takes at least under settings, of a policy that is really built under them."""
    values = one.config.model_dump(mode="json")
    for setting in settings:
        path, value = setting.split(": ")
        *groups, name = path.split(".")
        group = functools.reduce(dict.__getitem__, groups, values)
        group[name] = {"true": True, "false": False}.get(value, value)
    other = one.under(as_config(values))
    policy = trained_policy(other, empty=True)
    return memory._without_passes(other, policy.sizes(), policy.weights.trained(), policy, 0).needed


def test_of_several_processes_each_holds_the_gradients_that_are_averaged_once_more(session):
    """As DistributedDataParallel does, which has flat buckets of its own."""
    one = session()
    policy = trained_policy(one, empty=True)
    accelerator = types.SimpleNamespace(num_processes=2, device=one.accelerator.device, mixed_precision="no")
    two = dataclasses.replace(one, accelerator=accelerator)
    alone, beside = (
        memory._without_passes(each, policy.sizes(), policy.weights.trained(), policy, 0) for each in (one, two)
    )
    assert beside.peak - alone.peak == beside.parts()["gradients being averaged"] == policy.sizes().trained


@pytest.mark.parametrize(("settings", "changed"), [({}, ["model.weights: split"]), ({"model": SPLIT}, [])], ids=str)
def test_moments_of_8_bits_beside_weights_in_two_halves_take_8_bytes_a_weight(
    session, model, monkeypatch, settings, changed
):
    base, _ = numbers(model)
    one = session(**settings)
    policy = trained_policy(one, empty=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 9 * base)
    with pytest.raises(UserError) as refused:
        check_memory(one, policy, policy, 0)
    together = [*changed, "training.optimizer: adamw_8bit"]
    assert together in [named for named, _ in suggested(refused.value.hint)]
    assert least(one, together) == pytest.approx(8 * base, rel=0.02)


@pytest.mark.parametrize(
    ("bytes_a_weight", "settings"),
    [
        (7, ["training.offload: optimizer"]),
        (5, ["training.offload: optimizer", "training.optimizer: adamw_8bit"]),
    ],
)
def test_on_a_gpu_what_the_host_can_keep_is_named(session, model, monkeypatch, bytes_a_weight, settings):
    """There weights in bfloat16 take 2 bytes beside low bits and moments on the host; their gradients 4, or 2."""
    base, _ = numbers(model)
    accelerator = types.SimpleNamespace(num_processes=1, device=torch.device("cuda"), mixed_precision="bf16")
    one = dataclasses.replace(session(), accelerator=accelerator)
    policy = trained_policy(one, empty=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: bytes_a_weight * base)
    with pytest.raises(UserError) as refused:
        check_memory(one, policy, policy, 0)
    (first, _), *_ = suggested(refused.value.hint)
    assert first == settings
    assert least(one, settings) == pytest.approx((bytes_a_weight - 1) * base, rel=0.02)


def test_settings_that_change_nothing_beside_others_are_not_named(session, model, monkeypatch):
    """On a GPU in bfloat16 weights are split already."""
    accelerator = types.SimpleNamespace(num_processes=1, device=torch.device("cuda"), mixed_precision="bf16")
    one = dataclasses.replace(session(), accelerator=accelerator)
    policy, (base, _) = trained_policy(one, empty=True), numbers(model)
    for bytes_a_weight in (5, 9):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=bytes_a_weight * base: free)
        with pytest.raises(UserError) as refused:
            check_memory(one, policy, policy, 0)
        named = [settings for settings, _ in suggested(refused.value.hint)]
        assert ["training.offload: optimizer", "training.optimizer: adamw_8bit"] in named
        assert not any("model.weights: split" in settings for settings in named)


def test_the_parts_are_listed_one_below_the_other_with_the_peak_at_the_end(session, model, monkeypatch):
    one = session(reference="frozen")
    policy, (base, _) = trained_policy(one, empty=True), numbers(model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.raises(UserError) as refused:
        check_memory(one, policy, policy, 0)
    first, *lines = refused.value.what.splitlines()
    assert first == f"training needs at least {20 * base / 2**30:.2f} GiB of memory, but 0.00 GiB are free:"
    assert len({len(line) for line in lines}) == 1
    rows = {name.strip(): size for name, size in (re.split(" {2,}", line.strip()) for line in lines)}
    assert list(rows) == ["weights", "reference model", "optimizer", "gradients", "at the peak"]
    assert rows["weights"] == rows["gradients"] == f"{4 * base / 2**30:.2f} GiB"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_an_adapter_would_take_is_what_it_takes(kind, quantized):
    """Without PEFT and bitsandbytes, which take a second to import."""
    held = held_as("nf4", "bfloat16") if quantized else held_as("bfloat16", "bfloat16")
    plain = build(kind)
    laid_out = Policy(copy.deepcopy(plain), held=held).sketched(plain.config)
    held.lay_out(laid_out.model)
    exact = Policy(laid_out.model, Adapted(Lora()), held).sizes()
    told = sizes_under_lora(plain, Lora(), torch.bfloat16, quantized=quantized)
    assert (told.trained, told.num_trained, told.saved) == (exact.trained, exact.num_trained, exact.saved)
    # Of quantized layers bitsandbytes makes the biases in float32, until loading brings those of the file.
    assert told.held == pytest.approx(exact.held, rel=0.02 * quantized)
    assert told.numbers == exact.numbers


@pytest.fixture
def run(session, tmp_path):
    """Plan a run under some settings, and settle its forward passes where so much memory is free."""

    def settle(free, **settings):
        one = session(**settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "free_bytes", lambda device: 2**40)
            plan = planned(one, RunFolder(tmp_path / "run"), resume=False, extend=False)
            patch.setattr(memory, "free_bytes", lambda device: free)
            return settled_on_paper(plan, resume=False)

    return settle


ENOUGH = 2**40
"""More than any run here takes."""
FEW_TOKENS = {"micro_batch_tokens": 64, "pairs_per_step": 4}


def test_a_run_whose_smallest_pass_does_not_fit_is_refused_before_weights_are_read(run):
    """By its activations alone: without them it would."""
    _, memory_of_one = run(ENOUGH, training=FEW_TOKENS)
    assert memory_of_one.activations > 0
    with pytest.raises(UserError, match=r"needs at least [\d.]+ GiB of memory") as refused:
        run(memory_of_one.needed - 1)
    assert "activations" in refused.value.what
    (first, _), *_ = suggested(refused.value.hint)
    assert first == ["training.gradient_checkpointing: true"]
    assert refused.value.hint.endswith("or a lower `data.max_length`")
    checkpointed = {"training": {**FEW_TOKENS, "gradient_checkpointing": True}}
    assert run(memory_of_one.needed - 1, **checkpointed)[1].needed < memory_of_one.needed


def test_passes_are_cut_until_the_run_fits_and_a_number_that_was_asked_for_is_kept(run):
    least = run(ENOUGH, training=FEW_TOKENS)[1].needed
    free = int(1.3 * least)
    cut, settled = run(free)
    assert cut.micro_batch_tokens < 512
    assert settled.needed <= 0.8 * free
    asked, more = run(free, training={"micro_batch_tokens": 100_000, "pairs_per_step": 32})
    assert asked.micro_batch_tokens == 100_000
    assert more.needed > free


def test_of_what_fits_in_no_way_the_size_that_would_is_told(session, model, monkeypatch):
    """For all weights, and with an adapter."""
    one = session()
    policy = trained_policy(one, empty=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="training needs at least") as refused:
        check_memory(one, policy, policy, 0)
    sizes = (
        r"choose a model of at most \S+ billion parameters \(under `training.optimizer: adafactor`\), or \S+ billion "
    )
    assert re.match(sizes + r"parameters \(under `adapter: lora` and `model.quantize: nf4`\)", refused.value.hint)


def test_what_fits_is_not_refused(session, model, monkeypatch):
    one = session(adapter=LORA)
    policy = trained_policy(one, empty=True)
    base, adapter = numbers(model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * base + 17 * adapter)
    check_memory(one, policy, policy, 0)


def estimate(**parts):
    """Return an estimate of a run most of whose memory is activations."""
    nothing = {"program": 7, "reference": 0, "optimizer": 0, "gradients": 10, "logits": 0, "copy": 0}
    return MemoryEstimate(**{**nothing, "weights": 100, "activations": 400, "counted": True, "several": False, **parts})


def test_beside_an_adapter_freed_memory_is_kept_where_there_is_plenty_and_its_gaps_are_counted(session):
    one, taken = session(adapter=LORA), estimate()
    kept = memory._kept_or_returned(one, taken, 10_000)
    assert kept.keeps_freed
    assert kept.gaps > 0
    assert kept.peak == taken.peak + kept.gaps
    assert kept.parts()["gaps between tensors"] == kept.gaps
    assert memory._kept_or_returned(one, taken, 2 * kept.needed + 1) == kept
    assert memory._kept_or_returned(one, taken, 2 * kept.needed) == taken


def test_of_a_run_of_all_weights_gradients_and_moments_fill_the_gaps(session):
    assert memory._kept_or_returned(session(), estimate(), 0) == estimate(keeps_freed=True)


@pytest.mark.parametrize("settings", [{}, {"adapter": LORA}], ids=["all weights", "adapter"])
def test_where_activations_are_the_lesser_part_freed_memory_is_returned(session, settings):
    small = estimate(activations=90)
    assert memory._kept_or_returned(session(**settings), small, 10_000) == small
