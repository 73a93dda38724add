"""The native kernels as the kernels of moe_fn's ops: the library is built and put in their place on first use."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_fn.kernels.native.library import active
from moe_fn.kernels.native.support import problem


def run(name: str, otherwise: Callable[..., Any], like: Tensor, *rest: Any) -> Any:
    """The library's op on (like, *rest), or where it cannot run for such a tensor, `otherwise`.

    What moe_fn's native ops run until the library is in their place, which the first call sees to.
    """
    function = otherwise if problem(like.device.type, like.dtype) else getattr(active().ops, name)
    return function(like, *rest)
