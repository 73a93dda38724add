"""Starts ranks as processes, and ends them."""

import contextlib
import faulthandler
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# Names of installed packages only: the server does not have this process' import path.
_PRELOADED = ["torch", "torch.distributed.device_mesh", "torch.distributed.fsdp", "moe_fn.testing"]


def ranks_context() -> Any:
    """The multiprocessing context of all tests of ranks: a rank is forked from one server that has torch and moe_fn
    and starts in 0.1 s of CPU; a spawned one imports for 3 s.
    """
    context: Any = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextlib.contextmanager
def started(
    context: Any, target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], folder: Path, wait_s: float = 20
) -> Iterator[list[Any]]:
    """Starts a process for each row of arguments. At the end waits `wait_s` for each of them, and kills the others.

    An error in the body gets the stacks of the processes that crashed, which are written to the folder.
    """
    paths = [folder / f"{rank}.stacks" for rank in range(len(arguments))]
    processes = [
        context.Process(target=_run, args=(str(path), target, of_rank), daemon=True)
        for path, of_rank in zip(paths, arguments, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    except BaseException as error:
        for path in paths:
            if path.exists() and path.stat().st_size:
                error.add_note(f"{path.name}:\n{path.read_text()}")
        raise
    finally:
        for process in processes:
            process.join(timeout=wait_s)
            process.kill()
        for process in processes:
            process.join(timeout=10)


def _run(stacks: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable(os.open(stacks, os.O_CREAT | os.O_WRONLY))
    target(*arguments)
