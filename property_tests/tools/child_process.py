"""Child processes that test mutants: without output, and killed after a time limit."""

import os
import signal
import time


def silence() -> None:
    """Redirects the output of the current process to nothing."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)


def exit_code(child: int, seconds: float) -> int | None:
    """Returns the exit code of a child, a signal as a negative number, or None if it takes longer than `seconds`.

    It, or its process group, is then killed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    if os.getpgid(child) == child:
        os.killpg(child, signal.SIGKILL)
    else:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
