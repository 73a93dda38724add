"""The whole layer as one op: `moe_fn::moe_forward`, and `moe_fn::moe_forward_shared` with a separate shared output.

Why ops: some callers need one node per layer (piecewise CUDA graphs, partitioners), scan does not compile everywhere
(chunks), and torch.compile cannot read sizes between ranks (`moe_fn.parallel.sizes`); their backward then repeats the
collectives. There are two because an op's schema cannot return "a Tensor or a tuple". The config is a JSON
argument, and every weight is an argument. Only first derivatives exist: a second derivative raises ValueError.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, config_of_json
from moe_fn.layer.compose import outputs_of_tokens, route_tokens
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.define import define_op
from moe_fn.ops.flops import flops_of_kernel
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Routing, leaves_of_weights, weights_of_leaves
from moe_fn.torch_compat import check_draft_export

# x, then the inputs of the router or a routing: with expert_ids the op does not route.
# gate_x: the input of the gate, where it is not x.
_TOKEN_ARGS = (
    "x",
    "logits",
    "token_ids",
    "token_mask",
    "expert_ids",
    "expert_weights",
    "shared_weights",
    "adapter_ids",
    "gate_x",
)
_LEAVES = tuple("_".join(path) for path in WEIGHT_PATHS)
_REQUIRED = {"x", "gate_up", "down"}
_SCHEMA = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in _TOKEN_ARGS + _LEAVES)


def layer_as_op(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    routing: Routing | None,
    logits: Tensor | None,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    adapter_ids: Tensor | None,
    with_shared: bool,
    gate_x: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns (y,) or (shared, routed) from one node. Padding in x must be zeroed; with routing=None the op routes.

    With config.parallel a routing is required; ranks exchange logits if they are given, else the routing.
    """
    check_draft_export("moe_forward")
    routed = (None, None, None) if routing is None else (routing.expert_ids, routing.weights, routing.shared_weights)
    per_token = (x, logits, token_ids, token_mask, *routed, adapter_ids, gate_x)
    args = (config.json, *per_token, *leaves_of_weights(weights))
    out: Any = moe_forward_shared_op(*args) if with_shared else (moe_forward_op(*args),)
    return tuple(out)


def _rows(args: list[Any], chunk: slice) -> list[Any]:
    return [None if a is None else a[chunk] for a in args]


def _chunk(config: MoEConfig, with_shared: bool, args: list[Any]) -> tuple[Tensor, ...]:
    x, logits, token_ids, token_mask, ids, w, shared_w, adapter_ids, gate_x, *leaves = args
    weights, routing = (
        weights_of_leaves(leaves),
        Routing(expert_ids=ids, weights=w, shared_weights=shared_w, adapter_ids=adapter_ids),
    )
    if ids is None:
        _, chosen = route_tokens(config, weights, x if gate_x is None else gate_x, logits, token_ids, token_mask)
        routing = replace(chosen, adapter_ids=adapter_ids)
    return outputs_of_tokens(config, weights, x, routing, with_shared, logits)


def _chunks(config: MoEConfig, x: Tensor) -> list[slice]:
    size = config.chunk_tokens or max(x.shape[0], 1)
    return [slice(first, first + size) for first in range(0, max(x.shape[0], 1), size)]


def _forward_kernel(with_shared: bool, text: str, *args: Any) -> tuple[Tensor, ...]:
    config, tokens, leaves = config_of_json(text), list(args[: len(_TOKEN_ARGS)]), args[len(_TOKEN_ARGS) :]
    chunks = _chunks(config, args[0])
    if len(chunks) == 1:
        # Contiguous, as in the fake: without shared experts the cut of hidden padding is a view.
        return tuple(y.contiguous() for y in _chunk(config, with_shared, [*tokens, *leaves]))
    outs = [args[0].new_empty(args[0].shape) for _ in range(1 + with_shared)]
    for chunk in chunks:
        for out, y in zip(outs, _chunk(config, with_shared, [*_rows(tokens, chunk), *leaves]), strict=True):
            out[chunk] = y
    return tuple(outs)


def _backward_kernel(
    grad_shared: Tensor | None, grad: Tensor, needed: list[bool], text: str, *args: Any
) -> tuple[Tensor, ...]:
    config, wanted = config_of_json(text), [i for i, need in enumerate(needed) if need]
    chunks = _chunks(config, args[0])
    if len(chunks) == 1:
        gradients = _of_chunk(config, grad_shared, grad, wanted, args, None)
    else:
        gradients = {i: args[i].new_zeros(args[i].shape, dtype=accumulation_dtype(args[i].dtype)) for i in wanted}
        for rows in chunks:
            _add(gradients, rows, _of_chunk(config, grad_shared, grad, wanted, args, rows))
    # Contiguous, as in the fake.
    return tuple(
        gradients[i].to(args[i].dtype).contiguous() if i in gradients else args[0].new_empty(0)
        for i in range(len(args))
    )


def _add(gradients: dict[int, Tensor], rows: slice, of_chunk: dict[int, Tensor]) -> None:
    """Adds a chunk's gradients to the sums. A function, so that they are freed before the next chunk's are computed."""
    for i, gradient in of_chunk.items():
        into = gradients[i][rows] if i < len(_TOKEN_ARGS) else gradients[i]
        into += gradient


def _of_chunk(
    config: MoEConfig,
    grad_shared: Tensor | None,
    grad: Tensor,
    wanted: list[int],
    args: tuple[Any, ...],
    rows: slice | None,
) -> dict[int, Tensor]:
    """Returns the gradients of the arguments `wanted` from a slice of tokens; rows=None: from all tokens."""
    with_shared, per_token = grad_shared is not None, len(_TOKEN_ARGS)
    grads = [grad_shared, grad] if with_shared else [grad]
    chunk = list(args)
    if rows is not None:
        chunk, grads = [*_rows(chunk[:per_token], rows), *chunk[per_token:]], _rows(grads, rows)
    leaves = {i: chunk[i].detach().requires_grad_() for i in wanted}
    with torch.enable_grad():
        outs = _chunk(config, with_shared, [leaves.get(i, a) for i, a in enumerate(chunk)])
    # without shared experts the shared output is a constant
    pairs = [(out, g) for out, g in zip(outs, grads, strict=True) if out.requires_grad]
    if not pairs:
        return {i: torch.zeros_like(leaf) for i, leaf in leaves.items()}
    moved, directions = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(moved, tuple(leaves.values()), directions, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _backward_fake(grad_shared: Any, grad: Any, needed: list[bool], text: str, *args: Any) -> tuple[Tensor, ...]:
    return tuple(a.new_empty(a.shape) if need else args[0].new_empty(0) for a, need in zip(args, needed, strict=True))


def _gradients(inputs: list[Any], needed: Any, grad_shared: Tensor | None, grad: Tensor) -> tuple[Any, ...]:
    text, *args = inputs
    wanted = [bool(need and a is not None and a.is_floating_point()) for a, need in zip(args, needed[1:], strict=True)]
    if not any(wanted):
        return (None,) * len(inputs)
    gradients = moe_backward_op(grad_shared, grad, wanted, text, *args)
    return None, *(g if want else None for g, want in zip(gradients, wanted, strict=True))


_EXPECTED = "expected MoEConfig(opaque=False, batch_invariant=False), and in a graph chunk_tokens=None"


def _no_second_derivative(inputs: list[Any], needed: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise ValueError(f"moe_fn: the layer as one op has no second derivative; {_EXPECTED}")


def _no_forward_mode(inputs: list[Any], *tangents: Any) -> Any:
    raise ValueError(f"moe_fn: the layer as one op has no forward mode; {_EXPECTED}")


def _loop_over_batch(name: str) -> Any:
    """Returns the vmap rule of a whole-layer op: a loop over the batch, whose size is static under vmap."""

    def sample(args: Any, in_dims: Any, number: int) -> Any:
        op = getattr(torch.ops.moe_fn, name).default
        return op(*(a.select(d, number) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        samples = [sample(args, in_dims, number) for number in range(info.batch_size)]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


_GRADIENTS = ", ".join(["Tensor"] * len(_TOKEN_ARGS + _LEAVES))

moe_backward_op = define_op(
    f"moe_backward(Tensor? grad_shared, Tensor grad, bool[] needed, str config, {_SCHEMA}) -> ({_GRADIENTS})",
    kernel=_backward_kernel,
    flops=flops_of_kernel(_backward_kernel),
    fake=_backward_fake,
    vmap=_loop_over_batch("moe_backward"),
    backward=_no_second_derivative,
    jvp=_no_forward_mode,
)
moe_forward_op = define_op(
    f"moe_forward(str config, {_SCHEMA}) -> Tensor",
    kernel=lambda *args: _forward_kernel(False, *args)[0],
    flops=flops_of_kernel(partial(_forward_kernel, False)),
    fake=lambda config, x, *_: x.new_empty(x.shape),
    vmap=_loop_over_batch("moe_forward"),
    backward=lambda inputs, needed, grad: _gradients(inputs, needed, None, grad),
    jvp=_no_forward_mode,
)
moe_forward_shared_op = define_op(
    f"moe_forward_shared(str config, {_SCHEMA}) -> (Tensor, Tensor)",
    kernel=partial(_forward_kernel, True),
    flops=flops_of_kernel(partial(_forward_kernel, True)),
    fake=lambda config, x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    vmap=_loop_over_batch("moe_forward_shared"),
    backward=lambda inputs, needed, grad_shared, grad: _gradients(inputs, needed, grad_shared, grad),
    jvp=_no_forward_mode,
)
