"""CPU kernels of moe_fn's ops before the library is loaded: the first call builds and installs it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_fn.kernels.native.library import active
from moe_fn.kernels.native.support import problem


def run(name: str, otherwise: Callable[..., Any], like: Tensor, *rest: Any) -> Any:
    """Calls the library's op with (like, *rest), or `otherwise` if the kernels do not support the tensor `like`.

    moe_fn's native ops run this until the first call installs the library's kernels.
    """
    function = otherwise if problem(like.device.type, like.dtype) else getattr(active().ops, name)
    return function(like, *rest)
