"""Deterministic kernels: switched on for CUDA alone, before it starts, and off again; what lacks one is an error."""

import os

import pytest
import torch

from dpo_cli.errors import UserError
from dpo_cli.modeling.determinism import deterministic_kernels, driver_in
from dpo_cli.pipeline.session import precision_for


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU, as far as torch is asked; deterministic kernels are chosen on CPUs in the same way."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def switches():
    from torch._inductor import config

    return torch.are_deterministic_algorithms_enabled(), config.deterministic


def test_a_cpu_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_kernels(True):
        assert switches() == (False, False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_all_of_it_is_on_within_a_job_and_off_behind_it(cuda):
    with deterministic_kernels(True):
        assert switches() == (True, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        # New memory is not filled: that would cost time, and hide what reads it too early.
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert switches() == (False, False)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_who_does_not_want_it_gets_any_kernel(cuda):
    with deterministic_kernels(False):
        assert switches() == (False, False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_configuration_of_cublas_that_is_not_deterministic_is_an_error(cuda, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"), deterministic_kernels(True):
        pass
    with deterministic_kernels(False):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0"


def test_an_operation_without_such_a_kernel_is_named_with_the_setting_that_allows_it(cuda):
    with pytest.raises(UserError, match="the operation put_ of this model has") as error, deterministic_kernels(True):
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
    assert error.value.status == 1
    assert error.value.hint.startswith("set training.deterministic: false")
    assert switches() == (False, False)


def test_bfloat16_is_used_only_where_a_card_computes_in_it(cuda, monkeypatch):
    """As on a T4, whose kernels emulate it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    assert precision_for("auto", on_cpu=False) == "no"
    assert precision_for("float16", on_cpu=False) == "fp16"
    with pytest.raises(UserError, match=r"bfloat16 is not available on this GPU \(Tesla T4\)"):
        precision_for("bfloat16", on_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision_for("auto", on_cpu=False) == precision_for("bfloat16", on_cpu=False) == "bf16"


def test_other_errors_are_left_as_they_are(cuda):
    with pytest.raises(RuntimeError, match="another"), deterministic_kernels(True):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@host)\n"
            "GCC version:  gcc version 12.2.0\n",
            "580.65.06",
        ),
        ("another driver\n", None),
    ],
)
def test_the_driver_is_known_by_what_it_says(text, version):
    assert driver_in(text) == version
