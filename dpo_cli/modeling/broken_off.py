"""Whether an error says that another process is gone: no model and no setting of the run is then at fault."""

from __future__ import annotations

from torch.distributed import DistError


def is_broken_off(error: BaseException) -> bool:
    """Tell whether what processes exchanged broke off; gloo says so in a plain error that names itself."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
