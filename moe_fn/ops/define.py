"""Defines torch ops: `define_op`, the only caller of torch.library, makes an op that works under all of torch's
transforms.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from moe_fn.ops.flops import Formula, register_flops

_library = torch.library.Library("moe_fn", "FRAGMENT")

# The dispatcher's keys outside of every mode, read at import. Kernels run with them.
_AT_REST = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

Kernel = Callable[..., Any]
Gradients = Callable[..., Sequence[Tensor | None]]


def define_op(
    schema: str,
    *,
    kernel: Kernel,
    fake: Kernel,
    vmap: Kernel,
    backward: Gradients,
    jvp: Kernel | None = None,
    visible: Kernel | None = None,
    keeps: int | None = None,
    flops: Formula | None = None,
) -> Callable[..., Any]:
    """Define `moe_fn::<schema>`: an op that compiles, exports, differentiates and batches under every transform.

    kernel    computes on real tensors, with the dispatcher's keys of import time: without autocast (a caller's mode
              would reach its matmuls in eager, but not when compiled: 6e-3 apart) and with autograd keys (a dispatch
              mode, such as torch.compile's alias check, removes them, and func.vjp inside a kernel would fail)
    fake      the result's shape and dtype
    vmap      the batching rule, with the arguments of torch.library.register_vmap
    backward  (inputs, needed, *gradients) -> one gradient or None per input; it calls only ops, so it is differentiable
    jvp       (inputs, *tangents) -> the tangent
    visible   the same computation in aten ops, which replaces the op in the graph so that Inductor can fuse it
    keeps     index of the output without gradient that is passed to backward between `needed` and the gradients
    flops     (*inputs, out_val=result) -> operations of its products, for torch.utils.flop_counter; None: no products

    Why not torch.library.register_autograd: it fails under torch.func. Why not an autograd.Function around the op:
    under compile(func.grad) Dynamo drops its backward (zero gradients, no error), it fails under compile(vmap(grad)),
    and it excludes the whole model from AOTAutograd's cache. An Autograd kernel that calls a single-level function,
    into which functorch itself converts every autograd.Function, has none of these faults. Obsolete when
    register_autograd works under torch.func.
    """
    name = schema[: schema.index("(")]
    if "=" in schema:
        raise ValueError(f"define_op: {schema}: expected no defaults: the dispatcher drops arguments equal to them")
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: Any = getattr(torch.ops.moe_fn, name).default

    _library.impl(name, _at_rest(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_fn::{name}", fake, lib=_library)
    torch.library.register_vmap(f"moe_fn::{name}", vmap, lib=_library)
    if visible is not None:
        _trace_as(name, visible)
    if flops is not None:
        register_flops(getattr(torch.ops.moe_fn, name), _at_rest(flops))
    function = _single_level_function(name, op, backward, jvp, visible, keeps)

    def autograd(keyset: Any, *args: Any) -> Any:
        if visible is None and _nothing_to_differentiate(args):
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)  # 50 us less than the function below
        with enable_single_level_autograd_function():
            return function.apply(keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    defined: Callable[..., Any] = op
    return defined


def _at_rest(function: Callable[..., Any]) -> Callable[..., Any]:
    def at_rest(*args: Any, **kwargs: Any) -> Any:
        with _without_tangents(), torch._C._ForceDispatchKeyGuard(*_AT_REST), torch.no_grad():
            return function(*args, **kwargs)

    return at_rest


def _without_tangents() -> AbstractContextManager[None]:
    """Disables forward mode for a kernel.

    Tangents of forward_ad are stored on the tensors, independent of the dispatcher's keys; `jvp` computes the result's.
    """
    return _set_fwd_grad_enabled(False) if forward_ad._current_level >= 0 else nullcontext()


def _nothing_to_differentiate(args: tuple[Any, ...]) -> bool:
    """Whether no transform is active (redispatch would lose forward-mode tangents) and no input requires a gradient."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args))


def _trace_as(name: str, visible: Kernel) -> None:
    """Traces `visible` into the graph also where autograd keys are off (inference mode, a scan's body)."""

    def rule(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        with mode:
            return visible(*args)

    torch.library.register_torch_dispatch(f"moe_fn::{name}", ProxyTorchDispatchMode, rule, lib=_library)


def _single_level_function(
    name: str, op: Any, backward: Gradients, jvp: Kernel | None, visible: Kernel | None, keeps: int | None
) -> Any:
    def forward(keyset: Any, *args: Any) -> Any:
        # enable_grad and forward grad for the levels below this one; without them grad(grad) is silently zero.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            if visible is not None:
                return visible(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        ctx.constants = [None if isinstance(t, Tensor) else (t,) for t in inputs[1:]]  # inputs[0] is the keyset
        kept = () if keeps is None else (output[keeps],)
        ctx.save_for_backward(*tensors, *kept)
        if keeps is not None:
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros as its gradient
        if jvp is not None:
            ctx.save_for_forward(*tensors)

    def inputs_of(ctx: Any, saved: Sequence[Tensor]) -> list[Any]:
        tensors = iter(saved)
        return [next(tensors) if constant is None else constant[0] for constant in ctx.constants]

    def run_backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        needed = asked_for(ctx, [False, *(constant is None for constant in ctx.constants)])[1:]
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no second access
        if keeps is None:
            return None, *backward(inputs_of(ctx, saved), needed, *gradients)
        others = (g for i, g in enumerate(gradients) if i != keeps)
        return None, *backward(inputs_of(ctx, saved), needed, saved[-1], *others)

    members: dict[str, Any] = {"forward": forward, "setup_context": setup_context, "backward": run_backward}
    if jvp is not None:
        forward_mode = jvp
        members["jvp"] = lambda ctx, _, *tangents: forward_mode(inputs_of(ctx, ctx.saved_tensors), *tangents)
    members["_compiled_autograd_key"] = torch.autograd.Function._compiled_autograd_key
    namespace: dict[str, Any] = {key: staticmethod(value) for key, value in members.items()}
    return type(f"{name}_autograd", (torch.autograd.function._SingleLevelFunction,), namespace)


def asked_for(ctx: Any, is_tensor: Sequence[bool]) -> list[bool]:
    """In a Function's backward: for each argument of forward, whether autograd uses its gradient in this run.

    ctx.needs_input_grad says which arguments require a gradient: with autograd.grad of x alone that is true of the
    weights as well.
    """
    needed = list(ctx.needs_input_grad)
    if torch.compiler.is_compiling():  # a graph computes all gradients, and its compiler removes the unused ones
        return needed
    tensors = (i for i, tensor in enumerate(is_tensor) if tensor)
    for i, (node, _) in zip(tensors, ctx.next_functions, strict=True):  # one for each tensor
        needed[i] = needed[i] and _runs(node)
    return needed


def _runs(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf among the inputs of autograd.grad; or no run of the engine, but a direct call
        return True


def vjp(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Callable[..., Any]]:
    """torch.func.vjp for backward rules that also works under saved-tensor hooks (save_on_cpu around a whole step),
    where torch's raises.
    """
    if torch.compiler.is_compiling():
        return torch.func.vjp(function, *inputs)  # type: ignore[return-value]
    hidden = []
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hidden.append(hooks)
    try:
        return torch.func.vjp(function, *inputs)  # type: ignore[return-value]
    finally:
        for hooks in reversed(hidden):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def batch_to_front(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """The tensor with its vmapped dimension first; a tensor without one is expanded (a view)."""
    return tensor.movedim(dim, 0) if dim is not None else tensor.unsqueeze(0).expand(batch, *tensor.shape)


def batch_end_to_end(index: Tensor, dim: int | None, batch: int, step: int) -> Tensor:
    """Row numbers of every sample as indices into the concatenated rows of all samples, `step` rows each."""
    index = batch_to_front(index, dim, batch)
    return (index + torch.arange(batch, device=index.device, dtype=index.dtype).unsqueeze(1) * step).flatten()
