"""Starts ranks as processes."""

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
