"""All ranks of a run make the same forward passes, in the same order: where weights are split, each needs all ranks."""

from __future__ import annotations

import json
import re

import pytest
from tiny_models import build

import dpo_cli
from tests.conftest import build_llama, read_metrics, read_samples
from tests.faults.launching import run_ranks
from tests.marks import slow_unless

UNEVEN = {"pairs_per_step": 13, "micro_batch_tokens": 1, "rank_timeout": 60}
"""A pair in each pass. Of 40 pairs 32 are trained on, 13 in two steps and 6 in the last; 8 are held out. Neither two
nor three ranks have as many each. Where they wait for each other, the run ends with an error and does not hang."""

CASES = {
    "dpo, cached": (2, {}),
    "aot, frozen": (3, {"loss": "aot", "reference": "frozen"}),
    "simpo, padded, without a reference": (
        3,
        {"loss": "simpo", "reference": "none", "training": {"layout": "padded"}},
    ),
    "dpo, synced": (2, {"reference": {"type": "synced", "every_steps": 2}}),
    "an adapter, frozen": (2, {"adapter": "lora", "reference": "frozen"}),
    "recomputed, in bfloat16": (3, {"model": {"dtype": "bfloat16"}, "training": {"gradient_checkpointing": True}}),
    "experts, balanced": (2, {"loss": {"type": "dpo", "router_aux": 0.1}, "training": {"layout": "padded"}}),
}


@pytest.fixture
def passes_of(zygote, tmp_path):
    """Runs the program on ranks; returns the passes of each, and what was said."""

    def run(num_ranks, *arguments, **env):
        files = [tmp_path / f"passes-of-{rank}" for rank in range(num_ranks)]
        counted = {
            rank: ("tests.cli.counted:write_down_passes", {"file": str(file)}) for rank, file in enumerate(files)
        }
        env = {"DPO_CACHE_DIR": str(tmp_path / "cache"), "LOCAL_WORLD_SIZE": str(num_ranks), **env}
        ended = run_ranks(zygote, num_ranks, *arguments, env=env, faults=counted)
        assert ended.status == 0, ended.said
        return [file.read_text().split() for file in files], ended.said

    return run


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("case", slow_unless(lambda name: name in ("dpo, cached", "aot, frozen"), CASES))
def test_ranks_make_the_same_passes_and_the_run_of_one_process(
    write_config, passes_of, forked_dpo, tokenizer, tmp_path, case, sharding
):
    num_ranks, settings = CASES[case]
    training = {**UNEVEN, "sharding": sharding, **settings.get("training", {})}
    settings = {**settings, "training": training, "evaluation": {"every_steps": 2}}
    if "experts" in case:
        settings["model"] = {"name": str(tmp_path / "mixture")}
        build("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "mixture")
        tokenizer.save_pretrained(tmp_path / "mixture")
    file = write_config(**settings)
    passes, said = passes_of(num_ranks, "train", "--config", file)
    assert passes == passes[:1] * num_ranks
    assert {"gradient", "none"} == set(passes[0])
    assert re.search(r"^evaluating: 8/8", said, re.M)
    one = tmp_path / "runs" / "one"
    alone = forked_dpo("train", "--config", file, f"output_dir={one}", "training.sharding=none")
    assert alone.returncode == 0, alone.stderr
    exactness = 0.02 if "bfloat16" in case else 1e-5
    for split in ("train", "eval"):
        ours, theirs = (read_metrics(run, split) for run in (tmp_path / "runs" / "run", one))
        assert len(ours) == len(theirs) > 1
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert [row[name] for row in ours] == pytest.approx(
                [row[name] for row in theirs], rel=exactness, abs=exactness
            )
    ours, theirs = (read_samples(run) for run in (tmp_path / "runs" / "run", one))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 0, 2, 2, 3, 3]
    if "bfloat16" not in case:
        assert ours == theirs


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("reference", slow_unless(lambda name: name == "cached", ["cached", "frozen"]))
def test_ranks_that_evaluate_make_the_same_passes(
    write_config, passes_of, tiny_llama, tokenizer, tmp_path, reference, sharding
):
    """Eight held-out pairs do not divide among three ranks; two models are compared."""
    other = build_llama(tmp_path / "other", tokenizer, seed=1)
    training = {**UNEVEN, "layout": "padded", "sharding": sharding}
    file = write_config(training=training, reference=reference)
    models = ("--model", tiny_llama, "--model", other)
    passes, said = passes_of(3, "eval", "--config", file, *models, "--json", tmp_path / "figures.json")
    assert passes == passes[:1] * 3
    assert said.count("evaluating: 8/8") == 2
    found, alone = json.loads((tmp_path / "figures.json").read_text()), dpo_cli.evaluate(file, model=str(other))
    assert found["models"][1]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["comparisons"][0]["pairs"] == 8
