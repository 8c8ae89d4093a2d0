"""The one exception that the commands render: what went wrong, where, and how to fix it.

Anything else that escapes is a defect of the program and keeps its traceback. Several errors that were
found together travel as a standard `ExceptionGroup` of `UserError`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

USAGE, FAILED = 2, 1
"""Exit statuses: wrong usage, configuration or data; a run that failed."""

_OS_HINTS = {
    errno.ENOSPC: "free some space on that disk, or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder",
    errno.EFBIG: "the file is larger than this system or its limits (`ulimit -f`) allow",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.EEXIST: "choose another folder, or remove that one",
    errno.ENOTEMPTY: "choose another folder, or remove that one",
    errno.ENOENT: "check the path: a part of it does not exist",
    errno.ENOTDIR: "a part of that path is a file, not a folder",
    errno.EISDIR: "that is a folder; a file was expected",
    errno.EMFILE: "too many files are open: raise the limit with `ulimit -n`",
    errno.ENAMETOOLONG: "choose a shorter path",
}


class UserError(Exception):
    """Something the user can fix.

    Args:
        what: One sentence without a full stop: what is wrong.
        where: The file and line, the setting, or the folder it concerns.
        hint: What to do about it.
        status: The exit status, `USAGE` or `FAILED`.
    """

    def __init__(self, what: str, where: str | None = None, hint: str | None = None, *, status: int = USAGE) -> None:
        super().__init__(what)
        self.what, self.where, self.hint, self.status = what, where, hint, status

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  in {self.where}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


def raise_all(errors: Iterable[UserError]) -> None:
    """Raise the errors together, a single one by itself; do nothing where there are none."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ExceptionGroup("several errors", found)


def from_os_error(error: OSError, doing: str, where: str | None = None, *, status: int = FAILED) -> UserError:
    """Turn an operating system's refusal into a `UserError`, with a hint for the known causes."""
    # Libraries put words of their own around the system's.
    reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    place = where or (str(error.filename) if error.filename else None)
    hint = _OS_HINTS.get(error.errno or 0, "check that the path exists and may be read and written")
    return UserError(f"{doing} failed: {reason[0].lower()}{reason[1:]}", place, hint, status=status)
