"""The floors hold, and the script that says so can say otherwise."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.program


def test_no_room_imports_from_a_floor_above():
    done = subprocess.run(
        [sys.executable, "scripts/check_floors.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_an_import_that_goes_up_is_found(tmp_path):
    script = (ROOT / "scripts" / "check_floors.py").read_text(encoding="utf-8")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "check_floors.py").write_text(script, encoding="utf-8")
    room = tmp_path / "dpo_cli" / "modeling"
    room.mkdir(parents=True)
    (room / "logps.py").write_text("import os\nfrom dpo_cli.training import loop\nfrom dpo_cli.data import records\n")
    (tmp_path / "dpo_cli" / "attic.py").write_text("")
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "check_floors.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "dpo_cli/modeling/logps.py:2: `modeling` imports `training`" in done.stdout
    assert "`attic` is on no floor" in done.stdout
    assert "logps.py:3" not in done.stdout


TOUCHES = {
    "parameters", "named_parameters", "num_parameters", "get_parameter", "named_buffers", "zero_grad",
    "state_dict", "load_state_dict", "requires_grad_", "get_input_embeddings", "get_output_embeddings",
}  # fmt: skip
"""Methods by which a model's weights are reached."""

NO_WEIGHTS = {
    ("optimizer", "state_dict"), ("optimizer", "load_state_dict"), ("optimizer", "zero_grad"),
    ("scaler", "state_dict"), ("scaler", "load_state_dict"),
    ("logps", "requires_grad_"), ("autograd", "grad"),
}  # fmt: skip
"""What is called alike and reaches none: what it is called on, by its last name, and the name."""


def touched_weights(source: str) -> list[str]:
    """Return where a module calls a method of `TOUCHES` or looks at a gradient."""
    tree = ast.parse(source)
    called = {call.func for call in ast.walk(tree) if isinstance(call, ast.Call)}
    found = []
    for node in ast.walk(tree):
        # Other things have attributes of this name.
        if isinstance(node, ast.Attribute) and (node.attr != "parameters" or node in called):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if (node.attr == "grad" or node.attr in TOUCHES) and (name, node.attr) not in NO_WEIGHTS:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_room_but_modeling_touches_a_weight():
    """They ask the policy, so that adapters, quantized weights and shards are the business of one room."""
    package = ROOT / "dpo_cli"
    others = [path for path in package.rglob("*.py") if "modeling" not in path.relative_to(package).parts]
    assert len(others) > 50
    found = {str(path): touched_weights(path.read_text(encoding="utf-8")) for path in others}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("sum(p.numel() for p in policy.parameters())", True),
        ("clip(scorer.module.parameters(), 1.0)", True),
        ("read = model.state_dict", True),
        ("run.policy.load_state_dict(saved)", True),
        ("model.get_input_embeddings().weight.shape[0]", True),
        ("norms = [weight.grad.norm() for weight in policy.weights.trained()]", True),
        ("models[0].requires_grad_(False)", True),
        ("learner.optimizer.state_dict()", False),
        ("self.accelerator.scaler.load_state_dict(saved)", False),
        ("torch.autograd.grad(losses.sum(), tokens)", False),
        ("policy.weights.trained()", False),
    ],
)
def test_what_touches_a_weight_is_found(source, is_found):
    assert bool(touched_weights(source)) == is_found
