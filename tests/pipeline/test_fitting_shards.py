"""What the error of a run that does not fit says of shards: only what fits by the same estimate, on no more GPUs."""

from __future__ import annotations

import re

import pytest
from tiny_models import build

from dpo_cli.config import load_config
from dpo_cli.errors import UserError
from dpo_cli.pipeline import memory
from dpo_cli.pipeline.memory import check_memory
from dpo_cli.pipeline.models import trained_policy
from dpo_cli.pipeline.session import assuming
from dpo_cli.reporting.console import Console
from dpo_cli.system.assumed_devices import AssumedDevices
from tests.conftest import make_config

WIDTH, LAYERS, WORDS = 256, 16, 512


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A model whose decoder layers have most of the weights, and all of which divide by 64."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    build("llama", **sizes, **heads, tie_word_embeddings=True, attention_bias=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on(tmp_path, model, pairs_file):
    """Open a session on GPUs that are assumed, with so much memory each."""
    opened = []

    def open_one(count, free, **settings):
        config = load_config(make_config(tmp_path, model, pairs_file, **settings))
        opened.append(assuming(config, Console(quiet=True), AssumedDevices(1, count, int(free))))
        return opened[-1].__enter__()

    yield open_one
    for one in opened:
        one.__exit__(None, None, None)


def refused(session):
    """Return the hint of the error of a run that does not fit."""
    policy = trained_policy(session, empty=True)
    with pytest.raises(UserError, match="training needs at least") as error:
        check_memory(session, policy, policy, 0)
    assert error.value.status == 2
    return error.value.hint


def least(session):
    """Return what a process takes at least."""
    policy = trained_policy(session, empty=True)
    return memory._without_passes(session, policy.sizes(session.shards), policy.weights.trained(), policy, 0).peak


FULL = {"training": {"sharding": "full"}}


def test_several_processes_with_all_weights_each_are_told_of_shards_first(on):
    """On eight GPUs with half of what one process would hold."""
    whole = least(on(8, 0))
    hint = refused(on(8, whole / 2))
    said = re.match(r"set `training.sharding: full` \(([\d.]+) GiB\), or ", hint)
    assert said
    assert "GPUs" not in hint
    assert float(said[1]) == pytest.approx(least(on(8, whole / 2, **FULL)) / 2**30, abs=0.006)


@pytest.mark.parametrize("count", [2, 8, 16])
def test_the_fewest_gpus_are_named_on_which_the_run_fits(on, count):
    """On half as many it would not."""
    free = least(on(count, 0, **FULL)) + 1
    assert least(on(count // 2, 0, **FULL)) > free
    hint = refused(on(1, free))
    assert f"`training.sharding: full` on {count} GPUs ({free / 2**30:.2f} GiB on each)" in hint


def test_each_further_way_takes_fewer_gpus_and_fits_on_them(on):
    free = least(on(16, 0, **FULL)) + 1
    hint = refused(on(1, free))
    counts = [int(count) for count in re.findall(r" on (\d+) GPUs", hint)]
    assert counts == sorted(set(counts), reverse=True)
    for size in re.findall(r"\(([\d.]+) GiB", hint):
        assert float(size) <= free / 2**30 + 0.005


def test_a_run_in_shards_that_still_does_not_fit_is_told_of_more_gpus_and_of_less_to_hold(on):
    free = least(on(8, 0, **FULL)) + 1
    hint = refused(on(4, free, **FULL))
    assert "start 8 GPUs" in hint or "8 GPUs (" in hint
    assert "adafactor" not in hint
    offloaded = {"training": {"sharding": "full", "offload": "optimizer"}}
    assert ("`training.offload: optimizer` (" in hint) == (least(on(4, 0, **offloaded)) <= free)


def test_what_fits_in_shards_is_not_refused(on):
    session = on(4, least(on(4, 0, **FULL)), **FULL)
    policy = trained_policy(session, empty=True)
    check_memory(session, policy, policy, 0)
