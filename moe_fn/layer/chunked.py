"""chunk_tokens: the layer on chunks of tokens, as a Python loop in eager and as a scan in exported programs.

Peak memory is that of one chunk plus the gradients of the weights: the backward pass recomputes each chunk from the
saved inputs and sums weight gradients in the scan's carry.

Compiled functions use the whole-layer op instead, whose kernel loops. In torch 2.11 to 2.13 a scan disables the caches
of AOTAutograd and Inductor for its whole graph, so that every process would compile the model again. It also
compiles only under fullgraph=True, and not inside func.grad or torch.utils.checkpoint. `cacheable=True` in torch's
ScanOp would lift the first limit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fn.config import MoEConfig
from moe_fn.layer.compose import outputs_of_tokens
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.define import asked_for, vjp
from moe_fn.records import MoEWeights, Routing, leaves_of_weights, weights_of_leaves
from moe_fn.torch_compat import exporting, in_forward_mode, scan, transforms_active

_PER_TOKEN = 5  # x, expert_ids, weights, shared_weights, adapter_ids come before the tensors of MoEWeights


def layer_in_chunks(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, with_shared: bool
) -> tuple[Tensor, ...]:
    """Returns (y,), or (shared, routed) whose sum it is, computed in chunks of tokens."""
    # Without the router's weights, which are not read here. Their gradients would be a carry that the scan returns
    # unchanged, whose buffer Inductor (2.13) reuses twice: the zeros came out wrong.
    leaves = leaves_of_weights(dataclasses.replace(weights, router=None))
    args = [x, routing.expert_ids, routing.weights, routing.shared_weights, routing.adapter_ids, *leaves]
    if torch.compiler.is_compiling():
        # Dynamo (2.13) treats the inputs of func.grad as constants and drops the backward, but not for views of them.
        args = [None if a is None else a.view_as(a) for a in args]
        if not (torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in args)):
            # No gradient is needed, and Dynamo would call a Function.forward with *args in the old style, with ctx.
            return _forward(config, with_shared, *args)
    elif (
        in_forward_mode()
    ):  # forward-mode AD goes through the loop's ops; an autograd.Function with jvp does not compile
        return _forward(config, with_shared, *args)
    out: tuple[Tensor, ...] = _Chunked.apply(config, with_shared, *args)
    return out


def loop_is_visible() -> bool:
    """Whether to loop over chunks here: in eager, and in exported programs without transforms of torch.func."""
    if not torch.compiler.is_compiling():
        return True
    return exporting() and not transforms_active()


def _chunk(config: MoEConfig, with_shared: bool, args: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Computes one chunk from a flat list of arguments."""
    x, ids, w, shared_w, adapter_ids, *leaves = args
    routing = Routing(expert_ids=ids, weights=w, shared_weights=shared_w, adapter_ids=adapter_ids)  # type: ignore[arg-type]
    return outputs_of_tokens(config, weights_of_leaves(leaves), x, routing, with_shared)  # type: ignore[arg-type]


def _forward(config: MoEConfig, with_shared: bool, *args: Any) -> tuple[Tensor, ...]:
    tokens, leaves = _with_spare_row(args[:_PER_TOKEN]), list(args[_PER_TOKEN:])

    def step(carry: Tensor, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return carry.clone(), _chunk(config, with_shared, [*_pick(tokens, rows), *leaves])

    pieces: tuple[Tensor, ...] = _scan(config, step, args[0].new_zeros(()), args[0])[1]
    return pieces


class _Chunked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(config: MoEConfig, with_shared: bool, *args: Any) -> tuple[Tensor, ...]:
        return _forward(config, with_shared, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.config, ctx.with_shared, *args = inputs
        ctx.present = [a is not None for a in args]
        ctx.save_for_backward(*(a for a in args if a is not None))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        args: list[Any] = [next(saved) if there else None for there in ctx.present]
        needed = asked_for(ctx, [False, False, *ctx.present])[2:]
        wanted = [i for i, need in enumerate(needed) if need and args[i].is_floating_point()]
        per_token, of_weights = [i for i in wanted if i < _PER_TOKEN], [i for i in wanted if i >= _PER_TOKEN]
        tokens, padded = _with_spare_row(args[:_PER_TOKEN]), _with_spare_row(gradients)

        def step(carry: tuple[Tensor, ...], rows: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            chunk = [*_pick(tokens, rows), *args[_PER_TOKEN:]]

            def function(*inputs: Tensor) -> tuple[Tensor, ...]:
                replaced = dict(zip(wanted, inputs, strict=True))
                return _chunk(ctx.config, ctx.with_shared, [replaced.get(i, a) for i, a in enumerate(chunk)])

            pull = vjp(function, *(chunk[i] for i in wanted))[1]
            parts = dict(zip(wanted, pull(tuple(_pick(padded, rows))), strict=True))
            return tuple(c + parts[i] for c, i in zip(carry, of_weights, strict=True)), tuple(
                parts[i] for i in per_token
            )

        # a function, because a local variable would keep the zeros alive while the sums replace them
        def zeros() -> tuple[Tensor, ...]:
            return tuple(torch.zeros_like(args[i], dtype=accumulation_dtype(args[i].dtype)) for i in of_weights)

        sums, pieces = _scan(ctx.config, step, zeros(), args[0])
        computed = {i: g.to(args[i].dtype) for i, g in zip(of_weights, sums, strict=True)} | dict(
            zip(per_token, pieces, strict=True)
        )
        return None, None, *(computed.get(i) for i in range(len(args)))


def _with_spare_row(tensors: Any) -> list[Tensor | None]:
    """Appends one row for tokens past the end: zeros, and -1 for ids (no expert, so no product)."""

    def spare(t: Tensor) -> Tensor:
        value = 0 if t.dtype.is_floating_point else -1
        return F.pad(t, (0, 0) * (t.ndim - 1) + (0, 1), value=value)

    return [None if t is None else spare(t) for t in tensors]


def _pick(tensors: list[Tensor | None], rows: Tensor) -> list[Any]:
    return [None if t is None else t.index_select(0, rows) for t in tensors]


def _scan(config: MoEConfig, step: Callable[[Any, Tensor], Any], carry: Any, x: Tensor) -> tuple[Any, Any]:
    """Runs carry, piece = step(carry, row indices of a chunk) for every chunk; returns carry and concatenated pieces.

    In a scan all chunks have chunk_tokens rows, and indices past the end are the spare row `tokens`. In eager and in
    the op the last chunk has only the remaining rows.
    """
    tokens, size, device = x.shape[0], config.chunk_tokens or 1, x.device

    if torch.compiler.is_compiling():

        def body(carry: Any, number: Tensor) -> Any:
            return step(carry, (number * size + torch.arange(size, device=device)).clamp(max=tokens))

        # At least two chunks, because 0 and 1 specialize: one graph for every number of tokens.
        carry, pieces = scan(body, carry, torch.arange(tokens // size + 2, device=device))
        all_rows = torch.arange(tokens, device=device)  # narrow would add a guard tokens <= chunks * size
        return carry, tree_map(lambda piece: piece.flatten(0, 1).index_select(0, all_rows), pieces)
    collected = []
    for first in range(0, max(tokens, 1), size):
        carry, piece = step(carry, torch.arange(first, min(first + size, tokens), device=device))
        collected.append(piece)
    return carry, tree_map(lambda *parts: torch.cat(parts), *collected)
