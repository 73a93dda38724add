"""CPU-time limit of a test of kernels: an endless loop raises instead of hanging."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TookTooLong(BaseException):
    """The CPU-time limit was exceeded.

    Not an Exception: Hypothesis would try to shrink it, and run the endless loop again and again.
    """


@contextmanager
def at_most_cpu_seconds(seconds: float, what: str) -> Iterator[None]:
    """Raises TookTooLong if the code inside uses more CPU time of this process; other processes do not count.

    It interrupts Python code only (such as Triton's interpreter), in the main thread, and not on Windows, which has no
    such timers.

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
