"""A way to train, hold or place weights, or an adapter, is one file: made-up ones go into a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, dpo_command, make_config, read_metrics
from tests.marks import slow_unless

pytestmark = pytest.mark.program

MEMBERS = {
    "trained.py": (
        "Trained",
        '''
class NormWeights(WholeWeights):
    """The norms of a model."""

    def keep_beginning(self) -> None:
        self.before = [weights.detach().clone() for weights in self.trained()]

    @contextlib.contextmanager
    def at_beginning(self):
        now = [weights.data for weights in self.trained()]
        for weights, before in zip(self.trained(), self.before, strict=True):
            weights.data = before
        yield
        for weights, after in zip(self.trained(), now, strict=True):
            weights.data = after

    def state(self) -> dict[str, Tensor]:
        return {name: weights.detach() for name, weights in self.model.named_parameters() if weights.requires_grad}


class Norms(Whole):
    """Train the norms alone."""

    def choose(self, model: PreTrainedModel) -> NormWeights:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return NormWeights(model)
''',
    ),
    "held.py": (
        "Held",
        '''
class Float64(Float32):
    """Hold every weight in 64 bits."""

    type: Literal["float64"] = "float64"

    def built_as(self) -> dict[str, Any]:
        import torch

        return {"dtype": torch.float64}
''',
    ),
    "placement.py": (
        "Placement",
        '''
@dataclass(frozen=True)
class Gentle(Alone):
    """One process, which lets no gradient through."""

    def clip(self, trained: Iterable[Parameter], norm: float | None) -> Tensor:
        return super().clip(trained, norm and 1e-12)
''',
    ),
    "adapters/settings.py": (
        "Adapter",
        '''
from typing import Annotated


class LoHa(AdapterSettings):
    """The Hadamard product of two low-rank matrices. Source: Hyeon-Woo et al. 2021, arXiv 2108.06098."""

    type: Literal["loha"] = "loha"
    """Which adapter."""
    rank: int = Field(4, ge=1)
    """The rank of each of both."""

    @property
    def title(self) -> str:
        return f"LoHa rank {self.rank}"

    def layers(self, model: PreTrainedModel) -> PeftConfig:
        from peft import LoHaConfig

        from dpo_cli.modeling.adapters.targets import target_names

        names = target_names(model, ALL_LINEAR)
        return LoHaConfig(task_type="CAUSAL_LM", r=self.rank, alpha=self.rank, target_modules=names)
''',
    ),
}

ENTRY = {"Adapter": 'Annotated[{} | {}, Field(discriminator="type")]'}
"""How a union is written that has had one member until now."""

LEARN = """
import json, pathlib, sys
from transformers import AutoTokenizer
from dpo_cli.modeling.held import Float64
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.trained import Norms
from tests.builders import prepare_pairs, train_in_process

model, source, folder = map(pathlib.Path, sys.argv[1:])
held, empty = Policy.load(str(model), trained=Norms()), Policy.empty(str(model))
double = Policy.empty(str(model), held=Float64())
before = held.weights.tensors()
pairs = prepare_pairs(source, AutoTokenizer.from_pretrained(model), folder)
metrics, state = train_in_process(model, pairs, max_steps=3, max_grad_norm=None, ways={"trained": Norms()})
print(json.dumps({
    "losses": [row["loss"] for row in metrics],
    "saved": sorted(state),
    "moved": sorted(name for name in state if not state[name].equal(before[name])),
    "trained": held.sizes().trained, "beginning": held.sizes().beginning, "held": held.sizes().held,
    "held_double": double.sizes().held, "held_empty": empty.sizes().held,
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a copy of the package: in each of the files a class more, and a name more in the union."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "dpo_cli", folder / "dpo_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (union, code) in MEMBERS.items():
        file, made_up = folder / "dpo_cli" / "modeling" / name, re.search(r"class (\w+)", code)[1]
        entry = ENTRY.get(union, "{} | {}").format(made_up, r"\1")
        text, entries = re.subn(
            rf"^{union} = (.*)$", rf"{code}\n\n{union} = {entry}", file.read_text(encoding="utf-8"), flags=re.M
        )
        assert entries == 1, name
        file.write_text(text, encoding="utf-8")
    return folder


def run(package, *command):
    path = os.pathsep.join([str(package), str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run(
        command, cwd=package, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_way_to_train_and_to_hold_weights_is_used_by_all_that_asks(package, tiny_llama, pairs_file, tmp_path):
    """Two norms of each of two layers and the last one: 5 × 32 numbers of 44,192."""
    found = json.loads(run(package, sys.executable, "-c", LEARN, tiny_llama, pairs_file, tmp_path / "prepared"))
    assert len(found["saved"]) == 5
    assert all("norm" in name for name in found["saved"])
    assert found["moved"] == found["saved"]
    assert (found["trained"], found["beginning"]) == (5 * 32 * 4,) * 2
    assert found["held"] == found["held_empty"] == 44_192 * 4
    assert found["held_double"] == 44_192 * 8
    # The reference is the policy with the norms of the beginning: at first they are equal, and then not.
    assert found["losses"][0] == pytest.approx(0.693147, abs=1e-5)
    assert found["losses"][-1] != pytest.approx(0.693147, abs=1e-5)


def test_a_run_uses_another_placement_where_it_suits(package, tiny_llama, pairs_file, tmp_path):
    """Its gradients are clipped to nothing, and RMSprop with a large epsilon then moves nothing."""
    config = make_config(
        tmp_path,
        tiny_llama,
        pairs_file,
        training={"max_steps": 2, "optimizer": {"type": "rmsprop", "eps": 1.0}, "weight_decay": 0.0},
        data={"eval": None},
    )
    run(package, *dpo_command("train", "--config", config))
    rows = read_metrics(tmp_path / "runs" / "run")
    assert rows[0]["grad_norm"] > 0.1
    assert rows[1]["rewards/margins"] == pytest.approx(rows[0]["rewards/margins"], abs=1e-6)


@pytest.mark.parametrize("dtype", slow_unless(lambda name: name == "bfloat16", ["float32", "bfloat16"]))
def test_a_run_trains_another_adapter_saves_it_and_goes_on_with_it(package, tiny_llama, pairs_file, tmp_path, dtype):
    """Before step 1 it is the base, which answers for the reference; in the end PEFT loads it, and it is another."""
    adapter, data = {"type": "loha", "rank": 2}, {"eval": None}
    training = {"max_steps": 4, "learning_rate": 1e-2, "micro_batch_tokens": 512, "max_grad_norm": None}
    settings = {"adapter": adapter, "training": training, "data": data, "reference": "frozen"}
    config = make_config(tmp_path, tiny_llama, pairs_file, model={"name": str(tiny_llama), "dtype": dtype}, **settings)
    run(package, *dpo_command("train", "--config", config))
    folder = tmp_path / "runs" / "run"
    rows = read_metrics(folder)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[0]["rewards/margins"] == 0.0
    assert abs(rows[-1]["rewards/margins"]) > 1e-3
    assert json.loads((folder / "final" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    weights = (folder / "final" / "adapter_model.safetensors").read_bytes()
    # 2 layers of 7 matrices, each with four factors; nothing of the base.
    assert len(load_file(folder / "final" / "adapter_model.safetensors")) == 2 * 7 * 4

    tokens = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = base(tokens).logits
    with warnings.catch_warnings():
        # PEFT asks transformers in a way that is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        trained = PeftModel.from_pretrained(base, folder / "final")
    assert not torch.allclose(trained(tokens).logits, before, atol=1e-3)

    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    run(package, *dpo_command("train", "--config", config, "--resume"))
    assert (folder / "final" / "adapter_model.safetensors").read_bytes() == weights
    assert read_metrics(folder)[-1]["loss"] == rows[-1]["loss"]
