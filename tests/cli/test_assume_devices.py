"""`dpo train --dry-run --assume-devices`: what a run would take on GPUs that are not here, without weights."""

from __future__ import annotations

import json
import re

import pytest

from dpo_cli.errors import UserError
from dpo_cli.system.assumed_devices import AssumedDevices, assumed_devices
from tests.conftest import build_llama

GIB = 2**30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
NUMBERS = 8_030_261_248


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory, tokenizer):
    """A folder with settings and tokenizer of a Llama of 8B, and no weights."""
    folder = build_llama(tmp_path_factory.mktemp("large"), tokenizer, seed=0)
    (folder / "model.safetensors").unlink()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | LLAMA_8B))
    return folder


@pytest.fixture
def planned(forked_dpo, write_config, llama_8b):
    """Plan a run of that model on GPUs."""

    def plan(devices, **groups):
        file = write_config(**{"model": {"name": str(llama_8b)}, **groups})
        return forked_dpo("train", "--config", file, "--dry-run", "--assume-devices", devices)

    return plan


def memory(printed: str) -> dict[str, float]:
    """Return the parts of the memory of each process, in GiB."""
    found = re.findall(r"^memory(?: of each process)?: (.*?) {2,}([\d.]+) GiB", printed, re.MULTILINE)
    return {name: float(size) for name, size in found}


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("80GB", AssumedDevices(1, 1, 80 * 10**9)),
        ("8x80GB", AssumedDevices(1, 8, 80 * 10**9)),
        ("2x8x80GB", AssumedDevices(2, 8, 80 * 10**9)),
        ("4 x 39.5 GiB", AssumedDevices(1, 4, 79 * 2**29)),
    ],
)
def test_devices_are_read(text, devices):
    assert assumed_devices(text) == devices


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "80",
        "GB",
        "8x",
        "x80GB",
        "0x80GB",
        "8x0GB",
        "-1x80GB",
        "8x80TB",
        "2x2x2x80GB",
        "8*80GB",
        "9999999x80GB",
    ],
)
def test_what_is_no_devices_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="are no devices") as refused:
        assumed_devices(text)
    assert (refused.value.status, "8x80GB" in refused.value.hint) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run", "--assume-devices", "8x80"], "`8x80` are no devices"),
        (["--assume-devices", "8x80GB"], "in a dry run alone"),
        (["--dry-run", "--resume", "--assume-devices", "8x80GB"], "in a dry run alone"),
        (["training.sharding=hybrid", "--dry-run", "--assume-devices", "8x80GB"], "set `training.sharding: full`"),
        (
            ["training.sharding=full", "training.optimizer=adafactor", "--dry-run", "--assume-devices", "8x80GB"],
            "cannot step on shards",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(forked_dpo, write_config, arguments, said):
    result = forked_dpo("train", "--config", write_config(), *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_launched_process_assumes_no_devices(forked_dpo, write_config):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    launched = dict(zip(names, ("0", "0", "2", "localhost", "1"), strict=True))
    result = forked_dpo("train", "--config", write_config(), "--dry-run", "--assume-devices", "8x80GB", env=launched)
    assert result.returncode == 2
    assert "without a launcher" in result.stderr


def test_each_of_eight_gpus_holds_an_eighth_of_weights_gradients_and_moments(planned, tmp_path):
    """Of weights in two halves 4 bytes each, 4 of a gradient, 8 of AdamW."""
    result = planned("8x80GB", training={"sharding": "full", "pairs_per_step": 16})
    assert result.returncode == 0, result.stderr
    parts, eighth = memory(result.stdout), NUMBERS / 8 / GIB
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == tuple(
        pytest.approx(size * eighth, abs=0.006) for size in (4, 4, 8)
    )
    assert parts["free"] == pytest.approx(80e9 / GIB, abs=0.006)
    assert parts["at the peak"] < parts["free"]
    said = " ".join(result.stdout.split())
    assert "8 GPUs (assumed), bfloat16, 8 processes, weights in 8 shards" in said
    assert "time" not in dict(re.findall(r"^(\w+)( )", result.stdout, re.MULTILINE))
    assert not (tmp_path / "runs").exists()


def test_hybrid_shards_lie_within_a_machine(planned):
    """On two machines of four GPUs, each holds a quarter."""
    result = planned("2x4x80GB", training={"sharding": "hybrid", "pairs_per_step": 16})
    assert result.returncode == 0, result.stderr
    assert memory(result.stdout)["weights"] == pytest.approx(NUMBERS / GIB, abs=0.006)
    assert "8 GPUs on 2 machines (assumed), bfloat16, 8 processes, weights in 4 shards" in " ".join(
        result.stdout.split()
    )


def test_on_one_gpu_that_is_too_small_the_fewest_that_are_not_are_named(planned):
    """In full precision on 4 of them and not on 2; the error is one, and no weights are missed."""
    result = planned("80GB")
    assert (result.returncode, result.stdout) == (2, "")
    hint = " ".join(result.stderr.split("hint:")[1].split())
    found = re.search(r"`training.sharding: full` on (\d+) GPUs \(([\d.]+) GiB on each\)", hint)
    assert found[1] == "2"
    assert 8 * NUMBERS / GIB < float(found[2]) < 80e9 / GIB
    fitting = planned("2x80GB", training={"sharding": "full"})
    assert fitting.returncode == 0, fitting.stderr


def test_passes_are_cut_until_a_run_fits_on_the_gpus_that_are_assumed(planned):
    """Of 32 pairs in one pass each half is tried, also where the first halves change nothing."""
    run = {"training": {"sharding": "full", "pairs_per_step": 32}, "adapter": "lora"}
    plenty = planned("2x300GB", **run)
    assert plenty.returncode == 0, plenty.stderr
    few = planned(f"2x{1.1 * memory(plenty.stdout)['at the peak']:.0f}GiB", **run)
    assert few.returncode == 0, few.stderr
    tokens = [int(re.search(r"at most ([\d,]+), or one pair", one.stdout)[1].replace(",", "")) for one in (plenty, few)]
    assert tokens[0] == 16384
    assert tokens[1] < tokens[0]
    assert memory(few.stdout)["at the peak"] <= 0.8 * memory(few.stdout)["free"]
