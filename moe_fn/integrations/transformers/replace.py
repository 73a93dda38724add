"""replace_moe_blocks: whole blocks of a model, routing included, computed by moe_fn; in place, and nothing else of the model changes."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_fn.config import MoEConfig
from moe_fn.forward import moe_forward_routed, moe_route
from moe_fn.integrations.transformers.blocks import config_of_block, family_of_module, is_known, weights_of_block
from moe_fn.integrations.transformers.experts import experts_forward
from moe_fn.integrations.transformers.tensors import Plan, plan_of_block
from moe_fn.records import Routing


@dataclass(frozen=True)
class Replaced:
    """One block whose forward is ours: its name in the model, its class, and the config that it became."""

    name: str
    block: str
    config: MoEConfig


@dataclass(frozen=True)
class Report:
    """What replace_moe_blocks did. `left`: names of blocks that stay as they are, and why."""

    replaced: tuple[Replaced, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} blocks replaced, {len(self.left)} left"]
        for r in self.replaced:
            c = r.config
            lines.append(f"  {r.name}: {r.block}, {c.top_k} of {c.num_experts} experts, {c.hidden_size} x {c.intermediate_size}")
        return "\n".join([*lines, *(f"  {name} left: {why}" for name, why in self.left)])


@dataclass(frozen=True)
class Shape:
    """How a family's block is called and what it returns, where that is not (hidden) -> y.

    router     name of the module whose output transformers records as router_logits
    logits_at  where it looks for them in what the router returns
    stateful   the router keeps a state from layer to layer, and stays the model's own
    returns    what the block's callers want
    jitter     attributes of noise that the block adds to its input in training, which moe_forward has not
    """

    router: str = "gate"
    logits_at: int = 0
    stateful: bool = False
    returns: str = "y"
    jitter: tuple[str, ...] = ("jitter_noise", "input_jitter_noise", "router.moe_jitter_eps", "router.jitter_noise")


_ROUTER = Shape(router="router")
SHAPES: dict[str, Shape] = {  # by the first name of a family
    "jamba": _ROUTER,
    "afmoe": _ROUTER,
    "granitemoe": _ROUTER,
    "aria_text": _ROUTER,
    "phimoe": _ROUTER,
    "longcat_flash": _ROUTER,
    "dbrx": _ROUTER,
    "jetmoe": Shape(router="router", logits_at=4),
    "switch_transformers": Shape(router="router", logits_at=2),
    "gpt_oss": Shape(router="router", returns="y, weights"),
    "openai_privacy_filter": Shape(router="router", returns="y, weights"),
    "llama4_text": Shape(router="router", logits_at=1, returns="flat y, logits"),
    "ernie4_5_vl_moe_bank": Shape(returns="flat y, flat logits"),
    "zaya": Shape(stateful=True, returns="y, states"),
}

# (y [..., H], logits [T, L], weights [T, K], what else the router gave) -> what the block returns
RETURNS: dict[str, Callable[[Tensor, Tensor, Tensor, Any], Any]] = {
    "y": lambda y, logits, weights, rest: y,
    "y, weights": lambda y, logits, weights, rest: (y, weights),
    "y, states": lambda y, logits, weights, rest: (y, rest),
    "flat y, logits": lambda y, logits, weights, rest: (y.flatten(0, -2), logits),
    "flat y, flat logits": lambda y, logits, weights, rest: (y.flatten(), logits.flatten()),
}


@dataclass(frozen=True)
class Swap:
    """All that a replaced block's forward knows beside the block.

    shared: name of the block's module of shared experts, where it runs as it is and `config` has none: its gates and ups are modules of
    their own, which moe_forward would join in every call (13 % of the bytes of a token of Qwen3-Next).
    """

    config: MoEConfig
    plan: Plan
    shape: Shape
    shared: str | None = None


def replace_moe_blocks(model: nn.Module, configure: Callable[[MoEConfig], MoEConfig] = lambda config: config) -> Report:
    """Every Mixture-of-Experts block in the model gets a forward of ours; returns what was replaced and what was left, with reasons.

    The modules stay, with their names, parameters and buffers: state dicts, optimizers, hooks, `save_pretrained` and recorded router
    logits work on, and `restore_moe_blocks` undoes it. configure: changes each block's config, for example
    `lambda config: dataclasses.replace(config, chunk_tokens=512)`. Gemma-4's layers, which hold their experts among other things, get our
    experts in their own; blocks that are no token-choice mixtures are left, and named.

    Raises ValueError when a replaced block runs in training with noise (jitter, Phi's sampling) that moe_forward does not have.

    Laws
        A replaced model computes the same.

    >>> import torch, transformers
    >>> config = transformers.Qwen3MoeConfig(
    ...     num_hidden_layers=1, hidden_size=16, moe_intermediate_size=8, intermediate_size=8, num_experts=4, num_experts_per_tok=2,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32,
    ... )
    >>> model = transformers.Qwen3MoeForCausalLM(config).eval()
    >>> ids = torch.tensor([[3, 1, 4]])
    >>> theirs = model(ids).logits
    >>> print(replace_moe_blocks(model))
    1 blocks replaced, 0 left
      model.layers.0.mlp: Qwen3MoeSparseMoeBlock, 2 of 4 experts, 16 x 8
    >>> torch.testing.assert_close(model(ids).logits, theirs)
    """
    replaced, left = [], []
    for name, module in model.named_modules():
        if not any(is_known(cls) for cls in type(module).__mro__):
            if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router")):
                left.append((name, f"{type(module).__name__} is not a block that is known"))
            continue
        family = family_of_module(module)
        if family.refused:
            left.append((name, family.refused))
            continue
        if not isinstance(getattr(module, "experts", getattr(module, "input_linear", None)), nn.Module):
            continue  # a Gemma-4 layer without experts
        plan = plan_of_block(family.names[0], module)
        config = configure(config_of_block(family, module, plan))
        _swap(module, _swap_of(module, config, plan, SHAPES.get(family.names[0], Shape())), family.names[0])
        replaced.append(Replaced(name, type(module).__name__, config))
    return Report(tuple(replaced), tuple(left))


def restore_moe_blocks(model: nn.Module) -> int:
    """Undo replace_moe_blocks; returns how many modules got their own forward back."""
    ours = [m for m in model.modules() if getattr(m.__dict__.get("forward"), "func", None) in _OURS]
    for module in ours:
        del module.forward
    return len(ours)


def _swap_of(block: nn.Module, config: MoEConfig, plan: Plan, shape: Shape) -> Swap:
    shared = config.shared
    apart = next((source.names for path, source in plan if path == "shared.gate_up" and source.form == "end to end"), None)
    sum_of_two = shared is not None and shared.gate != "router" and shared.combine == "sum"
    if apart is None or not sum_of_two or (config.norms is not None and config.norms.output):
        return Swap(config, plan, shape)
    plan = tuple((path, source) for path, source in plan if not path.startswith("shared."))
    return Swap(dataclasses.replace(config, shared=None), plan, shape, shared=apart[0].split(".")[0])


def _shared_output(block: Any, name: str, x: Tensor) -> Tensor:
    """The block's own shared experts, times their own gate if they have one."""
    y: Tensor = getattr(block, name)(x)
    gate = getattr(block, "shared_expert_gate", None)
    return y if gate is None else torch.sigmoid(gate(x)) * y


def _swap(block: Any, swap: Swap, family: str) -> None:
    if family == "gemma4_text":
        block.router.forward = functools.partial(gemma_router_forward, block, swap)
        block.experts.forward = functools.partial(experts_forward, block.experts)
        return
    if not swap.shape.stateful:
        router = getattr(block, swap.shape.router)
        router.forward = functools.partial(router_forward, swap)
    block.forward = functools.partial(block_forward, block, swap)


def block_forward(block: nn.Module, swap: Swap, hidden_states: Tensor, extra: Tensor | None = None, **by_name: Tensor | None) -> Any:
    """A replaced block: hidden_states [..., H] -> y of that shape, or what the block's callers expect beside it."""
    _refuse_noise(block, swap)
    extra = next((value for value in by_name.values() if value is not None), extra)
    config, router = swap.config, getattr(block, swap.shape.router)
    weights = weights_of_block(config, block, swap.plan)
    rest: Any = None
    x = hidden_states if hidden_states.ndim > 1 else hidden_states.view(-1, config.hidden_size)
    if swap.shape.stateful:
        logits, *_, rest = router(x, router_states=extra)
        logits, routing = moe_route(config, weights, x, logits.view(*x.shape[:-1], -1))
    else:
        logits, routing = _unpack(swap.shape, router(x, weights, extra if config.router.selection == "hash" else None))
    y = moe_forward_routed(config, weights, x, routing)
    y = y if swap.shared is None else y + _shared_output(block, swap.shared, x)
    flat_weights = routing.weights.flatten(0, -2).to(x.dtype)
    return RETURNS[swap.shape.returns](y, logits.flatten(0, -2), flat_weights, rest)


def router_forward(swap: Swap, x: Tensor, weights: Any, token_ids: Tensor | None) -> tuple[Any, ...]:
    """A replaced router, called by block_forward; a module, so that whoever records router logits sees them."""
    logits, routing = moe_route(swap.config, weights, x, token_ids=token_ids)
    return _pack(swap.shape, logits, routing)


def gemma_router_forward(layer: nn.Module, swap: Swap, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gemma-4's router, which its layer calls: (probabilities, weights, ids)."""
    weights = weights_of_block(swap.config, layer, swap.plan)
    logits, routing = moe_route(swap.config, weights, hidden_states)
    return torch.softmax(logits.float(), -1), routing.weights, routing.expert_ids


def _pack(shape: Shape, logits: Tensor, routing: Routing) -> tuple[Any, ...]:
    """The logits, flat, where transformers looks for them; what we need comes after."""
    return (*([None] * shape.logits_at), logits.flatten(0, -2), logits, routing.expert_ids, routing.weights, routing.shared_weights)


def _unpack(shape: Shape, packed: tuple[Any, ...]) -> tuple[Tensor, Routing]:
    logits, ids, w, shared = packed[shape.logits_at + 1 :]
    return logits, Routing(expert_ids=ids, weights=w, shared_weights=shared)


def _refuse_noise(block: nn.Module, swap: Swap) -> None:
    if not block.training:
        return
    if swap.config.router.selection == "sparsemixer":
        raise ValueError(f"{type(block).__name__} samples its experts in training, moe_fn does not; expected eval()")
    for path in swap.shape.jitter:
        value: Any = block
        for name in path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, float | int) and value > 0:
            raise ValueError(f"{type(block).__name__}.{path} is {value}: noise of training that moe_fn does not add; expected 0 or eval()")


_OURS = (block_forward, router_forward, gemma_router_forward, experts_forward)
