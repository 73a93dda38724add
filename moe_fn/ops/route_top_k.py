"""Router as one op, for back-ends with a kernel that computes scores, choice and weights.

Why an op: top-k is a sort, which Inductor cannot generate; composed of torch's ops the router takes a dozen launches on
a GPU, as long as a layer's products at 1 token, and up to 9 calls on a CPU. Obsolete when Inductor generates top-k with
a prologue and an epilogue.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, config_of_json
from moe_fn.ops.define import Kernel, batch_to_front, define_op, vjp

WeightsOfIds = Callable[[MoEConfig, Tensor, Tensor | None, Tensor], Tensor]


def _fake(logits: Tensor, correction_bias: Tensor | None, config: str) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], config_of_json(config).top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def define_route_top_k(backend: str, kernel: Kernel, weights_of_ids: WeightsOfIds) -> Kernel:
    """Defines the op of a back-end: logits [T, E], correction_bias [E] or None, config as JSON -> weights [T, k]
    float32, ids [T, k] int64.

    `weights_of_ids` computes the weights of given ids in torch; its gradient is the op's. The op has no forward mode;
    torch's own ops do.
    """

    def backward(args: list[Any], needed: list[bool], ids: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, correction_bias, config = args
        pull = vjp(lambda z: weights_of_ids(config_of_json(config), z, correction_bias, ids), logits)[1]
        return pull(gradient)[0] if needed[0] else None, None, None

    def vmap(info: Any, in_dims: Any, logits: Tensor, correction_bias: Tensor | None, config: str) -> Any:
        batched = batch_to_front(logits, in_dims[0], info.batch_size)
        if correction_bias is not None and in_dims[1] is not None:
            biases = batch_to_front(correction_bias, in_dims[1], info.batch_size)
            samples = [op(z, b, config) for z, b in zip(batched.unbind(), biases.unbind(), strict=True)]
            return tuple(torch.stack(o) for o in zip(*samples, strict=True)), (0, 0)
        out = op(batched.flatten(0, 1), correction_bias, config)
        return tuple(o.unflatten(0, batched.shape[:2]) for o in out), (0, 0)

    op = define_op(
        f"route_top_k_{backend}(Tensor logits, Tensor? correction_bias, str config) -> (Tensor, Tensor)",
        kernel=kernel,
        fake=_fake,
        vmap=vmap,
        backward=backward,
        keeps=1,
    )
    return op
