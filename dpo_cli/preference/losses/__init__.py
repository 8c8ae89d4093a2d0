"""Every loss: one small frozen model each, its equation beside the line; `Loss` at the end lists them.

For a pair: c = log π(chosen) − log π_ref(chosen), r the same of rejected, Δ = c − r, ls = log σ, |y| the number of a
response's tokens. Logs of sequences are sums over the response tokens unless noted. Where there is no reference, log
π_ref is 0. The loss of a step is the mean over its pairs.

The classes are settings as well, and are read before torch is needed: they compute with methods of tensors, and `ls`
is the only function that imports it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dpo_cli.preference.losses.pairwise import DPO, DPOP, EXO, IPO, LDDPO, RDPO, DiscoPOP, Hinge, Robust
from dpo_cli.preference.losses.pointwise import BCO, NCA, SPPO, APODown, APOZero
from dpo_cli.preference.losses.reference_free import CPO, ORPO, SFT, SimPO
from dpo_cli.preference.losses.transport import AOT, AOTUnpaired

Loss = Annotated[
    DPO
    | Robust
    | IPO
    | Hinge
    | EXO
    | NCA
    | BCO
    | SPPO
    | AOT
    | AOTUnpaired
    | APOZero
    | APODown
    | DiscoPOP
    | DPOP
    | SimPO
    | ORPO
    | CPO
    | RDPO
    | LDDPO
    | SFT,
    Field(discriminator="type"),
]
"""The closed union of all losses, discriminated by `type`."""
