"""Ownership and permission checks before loading the compiled library, because loading it runs its code."""

import os
import stat
from pathlib import Path

UNMAPPED = 65534  # the owner that a user namespace shows for users outside of it, including root


def private_folder(path: Path) -> Path:
    """The directory at a path, created if it is missing, writable only by this user (and root).

    Raises PermissionError if another user could write a library there: the directory or a parent belongs to another
    user, or a parent is world-writable. If this user's directory is writable by its group or by all, that permission is
    removed. All users may read it: a library is not secret, and one that root has built serves every user.
    """
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if os.name != "posix":
        return path  # Windows has no such modes; the directory is in the user's profile
    path = path.resolve()
    for folder in (path, *path.parents):
        found = folder.stat()
        if found.st_uid not in _trusted() and (folder == path or found.st_uid != UNMAPPED):
            raise PermissionError(
                f"{folder} belongs to user {found.st_uid}; expected this user's or root's (another user could write a "
                "library there)"
            )
        sticky = bool(found.st_mode & stat.S_ISVTX)
        if found.st_mode & stat.S_IWOTH and not sticky and folder != path:
            raise PermissionError(
                f"{folder} is world-writable; expected a directory of one user (others could write a library there)"
            )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        try:
            path.chmod(mode & ~0o022)
        except OSError as error:
            raise PermissionError(
                f"{path} has mode {mode:o}, and {user()} cannot change it ({error.strerror}); "
                f"expected mode {mode & ~0o022:o}"
            ) from error
    return path


def is_trusted(file: Path) -> bool:
    """Whether a regular file exists that only this user (or root) can have written.

    >>> is_trusted(Path("/no/such/file"))
    False
    """
    try:
        found = file.lstat()
    except FileNotFoundError:
        return False
    return os.name != "posix" or (
        stat.S_ISREG(found.st_mode) and found.st_uid in _trusted() and not found.st_mode & 0o022
    )


def user() -> str:
    """The user of this process, for messages."""
    return f"user {os.geteuid()}" if os.name == "posix" else "this user"


def _trusted() -> tuple[int, int]:
    return os.geteuid(), 0
