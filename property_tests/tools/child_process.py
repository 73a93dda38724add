"""Children that judge mutants: forked, silent, and waited for no longer than a time."""

import os
import signal
import time


def silence() -> None:
    """In a child: nothing that it prints is seen."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)


def exit_code(child: int, seconds: float) -> int | None:
    """The exit code that a child ends with, a signal as a negative number; None if it takes too long: it, or its group,
    is then killed.
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
