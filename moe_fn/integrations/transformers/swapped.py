"""The forwards of a replaced block, its router and its experts, and the record that they use."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_fn.config import MoEConfig
from moe_fn.families import Family
from moe_fn.families.row import LiveBlock, Source
from moe_fn.forward import moe_forward_routed, moe_route
from moe_fn.integrations.transformers.blocks import kind_of_block, weights_of_block
from moe_fn.integrations.transformers.experts import RUNNING, experts_forward
from moe_fn.integrations.transformers.forwards import has_own_forward
from moe_fn.integrations.transformers.reading import Kind, same_method, why_called, why_not_plain, without_wrappers
from moe_fn.integrations.transformers.tensors import Plan
from moe_fn.records import MoEWeights, Routing
from moe_fn.weights.shapes import expected_shapes

# (y [..., H], logits [T, L], weights [T, K], other outputs of the router) -> what the block returns
RETURNS: dict[str, Callable[[Tensor, Tensor, Tensor, Any], Any]] = {
    "y": lambda y, logits, weights, rest: y,
    "y, weights": lambda y, logits, weights, rest: (y, weights),
    "y, states": lambda y, logits, weights, rest: (y, rest),
    "flat y, logits": lambda y, logits, weights, rest: (y.flatten(0, -2), logits),
    "flat y, flat logits": lambda y, logits, weights, rest: (y.flatten(), logits.flatten()),
}


@dataclass(frozen=True)
class Swap:
    """The arguments of a replaced block's forward other than the block.

    cls            the block's class
    kind           classes of the modules that it reads
    experts_apart  whether the block's own forward calls moe_fn's experts
    shared         name of the block's module of shared experts if it is called and `config` has none: its gate and up
                   are separate modules, which moe_forward would concatenate in every call (13 % of the bytes of a token
                   of Qwen3-Next)
    changed        fields of the config that differ from the block's own
    """

    cls: type[nn.Module]
    config: MoEConfig
    plan: Plan
    live: LiveBlock
    kind: Kind
    experts_apart: bool
    shared: str | None = None
    changed: tuple[str, ...] = ()

    def why_called(self, block: nn.Module, idle: bool = False) -> str | None:
        """The name of a module that must be called, and the reason; None if the block's parameters may be read."""
        if not same_method(type(block).forward, self.cls.forward):
            return f"it is a {type(block).__name__} and was a {self.cls.__name__}"
        if not idle and (why := why_not_plain(block)) is not None:
            return f"it {why}"
        return why_called(block, self.kind, OURS, self.live.router, idle=idle)


def swap_of_block(family: Family, block: nn.Module, plan: Plan, own: MoEConfig, config: MoEConfig) -> Swap:
    """The Swap of a block, from its own config and the configured one."""
    shared = _shared_apart(config, plan) if config.shared == own.shared else None
    if shared is not None:
        plan = tuple((path, source) for path, source in plan if not path.startswith("shared."))
    called = () if shared is None else (shared, "shared_expert_gate")
    kind = kind_of_block(family, block, plan, called, alone=(family.live.router,) if family.live.stateful else ())
    experts = without_wrappers(getattr(block, "experts", None))
    known = dict(kind.children).get("experts", Kind(None)).cls is not None
    return Swap(
        cls=type(block),
        config=config if shared is None else dataclasses.replace(config, shared=None),
        plan=plan,
        live=family.live,
        kind=kind,
        shared=shared,
        experts_apart=known
        and hasattr(experts, "has_gate")
        and not (has_own_forward(experts, OURS) or why_not_plain(experts, idle=True)),
        changed=tuple(
            sorted(f.name for f in dataclasses.fields(config) if getattr(own, f.name) != getattr(config, f.name))
        ),
    )


def _shared_apart(config: MoEConfig, plan: Plan) -> str | None:
    """The name of the block's shared experts if the module can be called and its output added; else None."""
    shared = config.shared
    apart = next(
        (source.names for path, source in plan if path == "shared.gate_up" and source.form == "concatenate"), None
    )
    sum_of_two = shared is not None and shared.gate != "router" and shared.combine == "sum"
    if apart is None or not sum_of_two or config.batch_invariant or (config.norms is not None and config.norms.output):
        return None
    return apart[0].split(".")[0]


def check_honoured(block: nn.Module, swap: Swap, why: str, honoured: tuple[str, ...] = ()) -> None:
    """Raises ValueError if the block's own forward runs and `configure` changed options that it would ignore."""
    lost = [name for name in swap.changed if name not in (*RUNNING, *honoured)]
    if lost:
        kind = type(block).__name__
        raise ValueError(
            f"{kind}: configure changed {', '.join(lost)}, but its own forward runs, because {why}; expected changes "
            f"of {RUNNING} only"
        )


def block_forward(block: nn.Module, swap: Swap, *args: Any, **by_name: Any) -> Any:
    """The forward of a replaced block: hidden_states [..., H] to y of that shape, with the other outputs of its class.

    If a module below must be called, the block's own forward calls all of them, and its experts run on moe_fn.
    """
    why = swap.why_called(block)
    if why is None:
        return _whole_block(block, swap, *args, **by_name)
    if not swap.experts_apart:
        wanted = (
            "expected modules that compute what their parameters determine: merge adapters, wrap or offload the whole "
            "block"
        )
        raise ValueError(f"{type(block).__name__}: {why}; {wanted}, or restore_moe_blocks first")
    check_honoured(block, swap, why)
    return type(block).forward(block, *args, **by_name)


def _whole_block(
    block: nn.Module, swap: Swap, hidden_states: Tensor, extra: Tensor | None = None, **by_name: Tensor | None
) -> Any:
    _refuse_noise(block, swap)
    extra = next((value for value in by_name.values() if value is not None), extra)
    config, router = swap.config, getattr(block, swap.live.router)
    weights = weights_of_block(config, block, swap.plan)
    rest: Any = None
    x = hidden_states if hidden_states.ndim > 1 else hidden_states.view(-1, config.hidden_size)
    if swap.live.stateful:
        logits, *_, rest = router(x, router_states=extra)
        logits, routing = moe_route(config, weights, x, logits.view(*x.shape[:-1], -1))
    else:
        logits, routing = _unpack(swap.live, router(x, weights, extra if config.router.selection == "hash" else None))
    y = moe_forward_routed(config, weights, x, routing)
    y = y if swap.shared is None else y + _shared_output(block, swap.shared, x)
    flat_weights = routing.weights.flatten(0, -2).to(x.dtype)
    return RETURNS[swap.live.returns](y, logits.flatten(0, -2), flat_weights, rest)


def _shared_output(block: Any, name: str, x: Tensor) -> Tensor:
    """The output of the block's shared experts, times their sigmoid gate if they have one."""
    y: Tensor = getattr(block, name)(x)
    gate = getattr(block, "shared_expert_gate", None)
    return y if gate is None else torch.sigmoid(gate(x)) * y


def router_forward(router: nn.Module, swap: Swap, *args: Any, **by_name: Any) -> Any:
    """The forward of a replaced router.

    _whole_block calls the router module with (x, weights, token_ids), so that hooks that record router logits run;
    other calls run the router's own forward.
    """
    if len(args) < 2 or not isinstance(args[1], MoEWeights):
        return type(router).forward(router, *args, **by_name)
    x, weights, token_ids = args
    logits, routing = moe_route(swap.config, weights, x, token_ids=token_ids)
    return _pack(swap.live, logits, routing)


def replaced_experts_forward(
    experts: nn.Module, cls: type[nn.Module], running: str, *args: Any, **by_name: Any
) -> Tensor:
    """The forward of a replaced block's experts, when the block's own forward calls them."""
    if not same_method(type(experts).forward, cls.forward):  # the module has another class since
        y: Tensor = type(experts).forward(experts, *args, **by_name)
        return y
    return experts_forward(experts, *args, **by_name, running=running)


def swap_of_router(swap: Swap, router: nn.Module) -> Swap:
    """The Swap of a router, from that of its block.

    Its forward refers to the router only, so that a copy of the router does not copy experts.
    """
    above = f"{swap.live.router}."
    own = [(path, source) for path, source in swap.plan if path.startswith("router.")]
    plan = tuple(
        (path, Source(source.form, tuple(name.removeprefix(above) for name in source.names))) for path, source in own
    )
    return dataclasses.replace(swap, cls=type(router), plan=plan, kind=dict(swap.kind.children)[swap.live.router])


def gemma_router_forward(router: nn.Module, swap: Swap, hidden_states: Tensor) -> Any:
    """The forward of Gemma-4's replaced router, which its layer calls: returns (probabilities, weights, ids). swap is
    that of swap_of_router.
    """
    why = swap.why_called(router)
    if why is not None:
        check_honoured(router, swap, why)
        return type(router).forward(router, hidden_states)
    logits, routing = moe_route(swap.config, _with_empty_experts(swap, router, hidden_states), hidden_states)
    return torch.softmax(logits.float(), -1), routing.weights, routing.expert_ids


def _with_empty_experts(swap: Swap, router: nn.Module, x: Tensor) -> MoEWeights:
    """The router's weights, with experts' weights of the right shapes without memory: moe_route checks their shapes but
    does not read them.
    """
    weights, shapes = weights_of_block(swap.config, router, swap.plan), expected_shapes(swap.config)
    empty = {
        path: x.new_empty(()).expand([n for _, n in shape])
        for path, (shape, needed) in shapes.items()
        if needed and len(path) == 1
    }
    return dataclasses.replace(weights, **{path[0]: tensor for path, tensor in empty.items()})  # type: ignore[arg-type]


def _pack(live: LiveBlock, logits: Tensor, routing: Routing) -> tuple[Any, ...]:
    """The router's output: flat logits at the index where transformers records them, then logits and routing."""
    return (
        *([None] * live.logits_at),
        logits.flatten(0, -2),
        logits,
        routing.expert_ids,
        routing.weights,
        routing.shared_weights,
    )


def _unpack(live: LiveBlock, packed: tuple[Any, ...]) -> tuple[Tensor, Routing]:
    logits, ids, w, shared = packed[live.logits_at + 1 :]
    return logits, Routing(expert_ids=ids, weights=w, shared_weights=shared)


def _refuse_noise(block: nn.Module, swap: Swap) -> None:
    if not block.training:
        return
    if swap.config.router.selection == "sparsemixer":
        raise ValueError(
            f"{type(block).__name__} samples its experts in training; expected eval(): moe_fn does not sample"
        )
    for path in swap.live.jitter:
        value: Any = block
        for name in path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, float | int) and value > 0:
            raise ValueError(
                f"{type(block).__name__}.{path} is {value}, noise in training that moe_fn does not add; "
                "expected 0 or eval()"
            )


OURS = (block_forward, router_forward, gemma_router_forward, replaced_experts_forward)
