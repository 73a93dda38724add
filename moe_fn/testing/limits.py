"""A limit on the CPU time of a test: a loop that never ends fails by name instead of hanging."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TookTooLong(BaseException):
    """No Exception: Hypothesis would take it for a failure to make smaller, and run the endless loop again
    and again.
    """


@contextmanager
def at_most_cpu_seconds(seconds: float, what: str) -> Iterator[None]:
    """TookTooLong where the code inside uses more of this process's CPU than that; others on the machine do not count.

    Python code alone is interrupted (Triton's interpreter is), in the main thread, where there are timers: not on
    Windows.

    >>> with at_most_cpu_seconds(0.05, "a loop"):
    ...     while True:
    ...         pass
    Traceback (most recent call last):
    moe_fn.testing.limits.TookTooLong: a loop: more than 0.05 s of CPU
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"{what}: more than {seconds:g} s of CPU")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
