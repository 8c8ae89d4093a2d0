"""Run `dpo`, and write down the most memory that it took of a GPU.

python metered.py FILE train --config …
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path


def note_peak(file: Path) -> None:
    """Write the most bytes that this process has had on its GPU into a file; without one, nothing."""
    import torch

    if torch.cuda.is_available():
        file.write_text(str(torch.cuda.max_memory_reserved()))


if __name__ == "__main__":
    atexit.register(note_peak, Path(sys.argv.pop(1)))
    from dpo_cli.cli import main

    main()
