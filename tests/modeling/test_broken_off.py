"""Where another process is gone, no model is blamed for it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import DistNetworkError

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.refusals import explained
from dpo_cli.modeling.proof import asking

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:32941."


@pytest.mark.parametrize("error", [RuntimeError(CLOSED), DistNetworkError("recvValue failed on the socket")], ids=str)
@pytest.mark.parametrize("blames", [lambda: explained("model", "model"), lambda: asking(torch.nn.Linear(1, 1))])
def test_what_broke_off_is_raised_as_it_is(error, blames):
    with pytest.raises(type(error)) as raised, blames():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("blames", [lambda: explained("model", "model"), lambda: asking(torch.nn.Linear(1, 1))])
def test_what_a_model_fails_of_is_said_of_it(blames):
    with pytest.raises(UserError, match="shapes cannot be multiplied"), blames():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
