"""Batch-invariant elementwise op (exp, sigmoid, softplus, tanh, erf): an element's bits do not depend on its position.

Why an op: on a CPU torch's functions use vector code, and other code for the last elements of a tensor or of a thread's
part of it, so a token's bits depend on the number of tokens. Obsolete when torch's functions are batch-invariant.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fn.kernels.native import library as native
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.define import define_op

# Torch's function, which is used on other devices, and the derivative at x, where the value is y.
_TABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "exp": (torch.exp, lambda x, y: y),
    "sigmoid": (torch.sigmoid, lambda x, y: y * (1 - y)),
    "softplus": (F.softplus, lambda x, y: elementwise(x, "sigmoid")),
    "tanh": (torch.tanh, lambda x, y: 1 - y * y),
    "erf": (torch.erf, lambda x, y: 1.1283791670955126 * elementwise(-x * x, "exp")),
}


def _kernel(x: Tensor, function: str) -> Tensor:
    if x.device.type != "cpu":
        return _TABLE[function][0](x)
    problem = native.active().problem
    if problem is not None:
        raise ValueError(
            f"MoEConfig.batch_invariant=True: {problem}; expected the native kernels, whose elementwise functions are "
            "batch-invariant"
        )
    y: Tensor = native.active().ops.elementwise(x.to(accumulation_dtype(x.dtype)), function)  # type: ignore[attr-defined]
    return y.to(x.dtype)


def _slope(x: Tensor, function: str) -> Tensor:
    return _TABLE[function][1](x, elementwise(x, function))


def _vmap(info: Any, in_dims: Any, x: Tensor, function: str) -> tuple[Tensor, Any]:
    return elementwise(x, function), in_dims[0]


_elementwise_op = define_op(
    "elementwise(Tensor x, str function) -> Tensor",
    kernel=_kernel,
    fake=lambda x, function: x.new_empty(x.shape),
    vmap=_vmap,
    backward=lambda inputs, needed, gradient: (gradient * _slope(*inputs), None),
    jvp=lambda inputs, tangent, *_: tangent * _slope(*inputs),
)


def elementwise(x: Tensor, function: str) -> Tensor:
    """exp, sigmoid, softplus, tanh or erf of every element: any shape and floating dtype, computed in float32 or wider.

    >>> elementwise(torch.zeros(2), "exp").tolist()
    [1.0, 1.0]
    """
    y: Tensor = _elementwise_op(x, function)
    return y


exp = partial(elementwise, function="exp")
sigmoid = partial(elementwise, function="sigmoid")
softplus = partial(elementwise, function="softplus")
tanh = partial(elementwise, function="tanh")
erf = partial(elementwise, function="erf")
