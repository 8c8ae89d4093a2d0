"""Where settings were made: lines of a file, or overrides on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Places:
    """Where settings were made, which no two configurations differ by.

    Args:
        known: The place of each setting that was made, by its path.
    """

    known: Mapping[tuple[str, ...], str] = field(default_factory=dict, compare=False)

    def nearest(self, path: Sequence[str]) -> str | None:
        """Return where a setting was made, or else the nearest group around it; None: nothing is known of any."""
        found = (self.known.get(tuple(path[:length])) for length in range(len(path), -1, -1))
        return next((place for place in found if place), None)

    def of(self, *paths: Sequence[str]) -> str | None:
        """Return where those of some settings were made that were, which together are wrong; or else the first."""
        made = dict.fromkeys(self.known[path] for path in map(tuple, paths) if path in self.known)
        return " and ".join(made) or self.nearest(paths[0])
