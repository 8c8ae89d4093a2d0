"""`dpo doctor`: what it says of this machine, what it finds wrong, and how a program reads it."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

from dpo_cli.config.outputs import json_file_errors
from dpo_cli.doctor import exactness, machine
from dpo_cli.doctor.findings import CHECKS
from dpo_cli.doctor.machine import check_device, check_libraries
from dpo_cli.modeling import logps
from dpo_cli.modeling.attention.kernels import KERNELS, PIECES
from dpo_cli.modeling.attention.pieces import PieceMask
from dpo_cli.modeling.attention.trees import TokenTree
from dpo_cli.modeling.exactness import (
    TOLERANCES,
    AttentionCase,
    attention_errors,
    plain_attention,
    random_tree,
    seen_in,
)
from tests.cli.in_process import call
from tests.conftest import run_dpo

CPU = torch.device("cpu")


def findings_of(arguments, tmp_path, status=0):
    """Return what the doctor writes, by check and name."""
    file = tmp_path / "doctor.json"
    assert call(f"doctor {arguments} --json {file} --quiet") == status
    assert not list(json_file_errors(file)), "the next check may not replace it"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["ok"] is (status == 0)
    return {(finding["check"], finding["name"]): finding for finding in found["findings"]}


@pytest.mark.program
@pytest.mark.slow
def test_a_user_sees_every_check_and_a_program_reads_the_same(tmp_path):
    file = tmp_path / "doctor.json"
    ended = run_dpo("doctor", "--json", file)
    assert ended.returncode == 0, ended.stderr
    assert "nothing is wrong" in ended.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {"dpo", "date", "device", "ok", "findings"}
    assert found["ok"] is True
    assert list(dict.fromkeys(finding["check"] for finding in found["findings"])) == list(CHECKS)
    for finding in found["findings"]:
        assert set(finding) == {"check", "name", "state", "detail", "hint", "figures"}
        assert finding["name"] in ended.stdout
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert states["pieces"] == states["log-probabilities"] == states["kill and resume"] == "ok"
    if not torch.cuda.is_available():
        assert states["GPU"] == states["flex"] == states["varlen"] == "not here"


@pytest.mark.program
@pytest.mark.slow
def test_a_run_that_forgets_its_moments_when_it_is_resumed_is_found(tmp_path, monkeypatch):
    """A planted fault: the optimizer of a resumed run begins anew."""
    fault = (
        "import sys\n"
        "if '--resume' in sys.orig_argv:\n"
        "    import torch\n"
        "    torch.optim.AdamW.load_state_dict = lambda self, state: None\n"
    )
    (tmp_path / "sitecustomize.py").write_text(fault, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = findings_of("resume", tmp_path, status=1)["resume", "kill and resume"]
    assert found["state"] == "wrong"
    assert found["figures"]["differing"] == ["weights", "metrics"]


def test_kernels_and_log_probabilities_are_held_against_float64(tmp_path):
    found = findings_of("logps attention", tmp_path)
    assert {name for check, name in found if check == "attention"} == set(KERNELS)
    for key in (("attention", "pieces"), ("logps", "log-probabilities")):
        worst = found[key]["figures"]["worst"]
        assert worst.keys() == TOLERANCES.keys()
        assert all(0 < worst[dtype] <= limit for dtype, limit in TOLERANCES.items())


def scaled(attend):
    """A kernel that scales its products a little too much."""

    def wrong(self, query, key, value, scaling, softcap):
        return attend(self, query, key, value, 1.01 * scaling, softcap)

    return wrong


def forward_alone(attend):
    """A kernel of which the output is right and the gradient of the values is not."""

    def wrong(self, query, key, value, scaling, softcap):
        value = value * 1.05 - (value * 0.05).detach()
        return attend(self, query, key, value, scaling, softcap)

    return wrong


@pytest.mark.parametrize("fault", [scaled, forward_alone])
def test_a_kernel_with_a_fault_is_wrong(tmp_path, monkeypatch, capfd, fault):
    monkeypatch.setattr(exactness, "attention_cases", lambda dtypes: [AttentionCase("float32", 64, None, None)])
    monkeypatch.setattr(PieceMask, "attend", fault(PieceMask.attend))
    found = findings_of("attention", tmp_path, status=1)["attention", "pieces"]
    assert found["state"] == "wrong"
    assert "off by" in found["detail"]
    assert "do not train with it here" in found["hint"]
    out = capfd.readouterr().out
    assert "pieces" in out
    assert "1 wrong" in out


def test_a_kernel_that_breaks_is_wrong_and_the_other_checks_are_made(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no valid triton configs\nand a long tail")

    monkeypatch.setattr(PieceMask, "attend", broken)
    found = findings_of("attention logps", tmp_path, status=1)
    assert "RuntimeError: no valid triton configs" in found["attention", "pieces"]["detail"]
    assert "long tail" not in found["attention", "pieces"]["detail"]
    assert found["logps", "log-probabilities"]["state"] == "ok"


def test_a_kernel_that_breaks_for_some_heads_alone_is_named_with_what_to_do(tmp_path, monkeypatch):
    """As FlexAttention on a card with too little shared memory for heads of 256: a run takes another kernel."""
    right = PieceMask.attend

    def small_heads(self, query, *others):
        if query.shape[-1] == 256:
            raise RuntimeError("out of shared memory")
        return right(self, query, *others)

    monkeypatch.setattr(PieceMask, "attend", small_heads)
    found = findings_of("attention", tmp_path)["attention", "pieces"]
    assert found["state"] == "ok"
    assert "in 16 cases" in found["detail"]
    assert "it broke in 8 cases, as in float32, heads of 256: RuntimeError: out of shared memory" in found["detail"]
    assert "takes another kernel" in found["hint"]


def test_log_probabilities_with_a_fault_are_wrong(tmp_path, monkeypatch):
    right = logps._log_softmax_
    monkeypatch.setattr(logps, "_log_softmax_", lambda logits: right(logits).mul_(1.02))
    assert findings_of("logps", tmp_path, status=1)["logps", "log-probabilities"]["state"] == "wrong"


def test_the_plain_formula_is_that_of_each_sequence_alone():
    """Float64 attention over the tree's square, against causal attention over every sequence by itself."""
    tree, scaling = random_tree(2, 10, 12, 9), 0.3
    q, k, v = (torch.randn(1, heads, len(tree.tokens), 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = plain_attention(q, k, v, seen_in(tree, None), scaling, None)[0]
    for places in map(torch.from_numpy, tree.places):
        one = [part[:, :, places] for part in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scaling, enable_gqa=True)
        assert torch.allclose(whole[places], alone[0].transpose(0, 1), atol=1e-12)


def test_a_window_leaves_out_what_is_further_back():
    """Every token of a sequence sees itself and the two before it."""
    tree = random_tree(1, 10, 12, 9)
    seen = seen_in(tree, 3)
    for places in map(torch.from_numpy, tree.places):
        within = seen[places][:, places]
        distance = torch.arange(len(places))[:, None] - torch.arange(len(places))
        assert torch.equal(within, (distance >= 0) & (distance < 3))


def test_a_window_that_a_kernel_forgets_is_off_in_output_and_all_gradients(monkeypatch):
    case = AttentionCase("float32", 64, 20, None)
    assert max(attention_errors(PIECES, random_tree(), case, CPU)) < 1e-5
    right = TokenTree.mask
    monkeypatch.setattr(TokenTree, "mask", lambda self, window: right(self, None))
    assert min(attention_errors(PIECES, random_tree(), case, CPU)) > 1e-2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("attnetion", "`attnetion` is not a check\n"),
        ("attnetion attnetion", "`attnetion` is not a check\n"),
        ("cpu device gpu cpu", "`cpu`, `gpu` are not checks\n"),
    ],
)
def test_checks_that_do_not_exist_are_all_refused(capfd, asked, said):
    assert call(f"doctor {asked}") == 2
    assert said in capfd.readouterr().err


def test_lines_on_a_pipe_end_with_their_text(capfd):
    assert call("doctor device libraries --quiet") == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("device") for line in lines)
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_file_in_no_folder_is_refused_before_anything_is_checked(tmp_path, capfd):
    assert call(f"doctor --json {tmp_path / 'none' / 'doctor.json'}") == 2
    said = capfd.readouterr().err
    assert "there is no folder" in said
    assert "checking" not in said


def test_json_goes_to_standard_output_in_place_of_the_table(capfd):
    assert call("doctor device --json - --quiet") == 0
    assert json.loads(capfd.readouterr().out)["findings"][0]["name"] == "CPU"


def test_a_driver_that_torch_cannot_use_is_wrong(monkeypatch):
    """As with a build of torch for CPUs on a machine with a GPU: runs would be slow without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    gpu = list(check_device(CPU))[-1]
    assert gpu.state == "wrong"
    assert "built without CUDA" in gpu.detail


def test_a_library_that_is_too_old_is_wrong_and_a_missing_extra_is_not(monkeypatch):
    wanted = ["torch>=99", "numpy>=1.26", "absent>=1", "other>=1; extra == 'adapters'", "for-us>=1; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = {finding.name: finding for finding in check_libraries(CPU)}
    assert found["torch"].state == found["absent"].state == "wrong"
    assert ">=99 is needed" in found["torch"].detail
    assert found["other"].state == "not here"
    assert found["other"].hint == "`pip install 'dpo-cli[adapters]'`"
    assert "for-us" not in found
    assert "numpy" in found["installed"].detail
