"""Who else could have written a library that is about to be loaded: to load one is to run what it holds."""

import os
import stat
from pathlib import Path

UNMAPPED = 65534  # whom a user namespace shows for users that it does not have, root among them


def private_folder(path: Path) -> Path:
    """The folder at a path, made if it is not there, which nobody but this user may write into (and root, who may do
    anything).

    Raises PermissionError where somebody else could put a library there: the folder or one above it is another user's,
    or one above it is open to all. A folder of this user that its group or all may write into is closed to them. All
    may read it: a library is no secret, and what root has built is for every user.
    """
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if os.name != "posix":
        return path  # modes say nothing there; the folder lies in the user's profile
    path = path.resolve()
    for folder in (path, *path.parents):
        found = folder.stat()
        if found.st_uid not in _trusted() and (folder == path or found.st_uid != UNMAPPED):
            raise PermissionError(
                f"{folder} belongs to user {found.st_uid}, who could put a library there; expected your own, or root's"
            )
        sticky = bool(found.st_mode & stat.S_ISVTX)
        if found.st_mode & stat.S_IWOTH and not sticky and folder != path:
            raise PermissionError(
                f"{folder} is writable for everybody, who could put a library there; expected a folder of one user"
            )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        try:
            path.chmod(mode & ~0o022)
        except OSError as error:
            who = f"{path} is writable for more than its owner, and {user()} cannot close it ({error.strerror})"
            raise PermissionError(f"{who}; expected mode {mode & ~0o022:o}") from error
    return path


def only_ours(file: Path) -> bool:
    """Whether there is such a file, and nobody but this user can have written it.

    >>> only_ours(Path("/no/such/file"))
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
    """Who runs this process, for messages."""
    return f"user {os.geteuid()}" if os.name == "posix" else "this user"


def _trusted() -> tuple[int, int]:
    return os.geteuid(), 0
