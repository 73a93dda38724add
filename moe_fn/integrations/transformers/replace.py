"""replace_moe_blocks: replaces the forwards of a model's Mixture-of-Experts blocks in place."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moe_fn.config import MoEConfig
from moe_fn.integrations.transformers.blocks import (
    config_of_block,
    family_of_module,
    is_known,
    why_no_floats,
    why_not_known,
)
from moe_fn.integrations.transformers.experts import running_of
from moe_fn.integrations.transformers.forwards import has_own_forward, set_forward, unset_forward
from moe_fn.integrations.transformers.reading import without_wrappers
from moe_fn.integrations.transformers.swapped import (
    OURS,
    Swap,
    block_forward,
    check_honoured,
    gemma_router_forward,
    replaced_experts_forward,
    router_forward,
    swap_of_block,
    swap_of_router,
)
from moe_fn.integrations.transformers.tensors import plan_of_block


@dataclass(frozen=True)
class Replaced:
    """One replaced block: its name in the model, its class, and its config.

    called: the reason why the block's own forward still runs, with moe_fn's experts; None if moe_fn computes all of it.
    """

    name: str
    block: str
    config: MoEConfig
    called: str | None = None


@dataclass(frozen=True)
class Report:
    """The result of replace_moe_blocks; `left` has the names of blocks that are not replaced, with reasons."""

    replaced: tuple[Replaced, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} blocks replaced, {len(self.left)} left"]
        for r in self.replaced:
            c = r.config
            lines.append(
                f"  {r.name}: {r.block}, {c.top_k} of {c.num_experts} experts, {c.hidden_size} x {c.intermediate_size}"
            )
            lines += [] if r.called is None else [f"    its own forward with moe_fn's experts, because {r.called}"]
        return "\n".join([*lines, *(f"  {name} left: {why}" for name, why in self.left)])


def replace_moe_blocks(model: nn.Module, configure: Callable[[MoEConfig], MoEConfig] = lambda config: config) -> Report:
    """Replaces the forward of every Mixture-of-Experts block in the model. Returns the replaced blocks, and those left
    with reasons.

    Modules keep their names, parameters and buffers: state dicts, optimizers, hooks of the block, `save_pretrained` and
    recorded router logits still work, and `restore_moe_blocks` undoes it. configure changes each block's config, for
    example `lambda config: dataclasses.replace(config, chunk_tokens=512)`. In Gemma-4's layers, which have experts
    among other modules, router and experts are replaced. Blocks that are not token-choice mixtures are left and listed.

    A replaced block reads the parameters of its modules and does not call them, while that is equivalent. Every call
    checks it: no hooks on the modules, no other forward or class (PEFT's adapters, quantized layers, accelerate's
    offloading, FSDP2 on a part of the block), no sharded or quantized parameters, no active dropout. Otherwise the
    block's own forward runs, calls its modules, and only the experts are moe_fn's. Blocks whose experts cannot be
    called separately (dbrx, jetmoe, llama4, longcat_flash, step3p5, switch; any with quantized experts) are left and
    listed, or raise if it happens later. Parametrizations are computed. PEFT's adapters may be added before or after.
    Global hooks (register_module_forward_hook) see only the block, and torch.compile ignores hooks that are added after
    compilation, as for any module.

    Raises ValueError if a replaced block runs in training with noise (jitter, Phi's sampling) that moe_forward does not
    add, and if its own forward has to run but experts cannot be called, are not plain tensors, or `configure` changed
    more than chunk_tokens, recompute, opaque and backend.

    Laws
        A replaced model computes the same.
        Hooks and adapters below a replaced block take effect or are refused by name.

    >>> import torch, transformers
    >>> config = transformers.Qwen3MoeConfig(
    ...     num_hidden_layers=1, hidden_size=16, moe_intermediate_size=8, intermediate_size=8, num_experts=4,
    ...     num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32,
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
            if "experts" in module._modules and ("gate" in module._modules or "router" in module._modules):
                left.append((name, f"{type(module).__name__} is not a known block"))
            continue
        family = family_of_module(module)
        if family.refused:
            left.append((name, family.refused))
            continue
        if not isinstance(getattr(module, "experts", getattr(module, "input_linear", None)), nn.Module):
            continue  # a Gemma-4 layer without experts
        plan = plan_of_block(family, module)
        why = why_not_known(module) or why_no_floats(module, plan) or _why_taken(module)
        if why is not None:
            left.append((name, why))
            continue
        try:
            own = config_of_block(family, module, plan)
        except ValueError as error:  # an unknown option or activation
            left.append((name, str(error)))
            continue
        config = configure(own)
        swap = swap_of_block(family, module, plan, own, config)
        called = swap.why_called(module, idle=True)
        if called is not None and not swap.experts_apart:
            left.append((name, called))
            continue
        _swap(module, swap, called)
        replaced.append(Replaced(name, type(module).__name__, config, called))
    return Report(tuple(replaced), tuple(left))


def restore_moe_blocks(model: nn.Module) -> int:
    """Undoes replace_moe_blocks. Returns the number of modules whose forward was restored."""
    return sum(unset_forward(module, OURS) for module in model.modules())


def _why_taken(block: nn.Module) -> str | None:
    return "its forward is replaced already; expected that of its class" if has_own_forward(block, OURS) else None


def _swap(block: nn.Module, swap: Swap, called: str | None) -> None:
    """Sets forwards on the block, its router and its experts. Called by other code, router and experts compute the same
    as before, the experts with moe_fn's products.
    """
    whole = not swap.live.is_layer
    if called is not None:
        check_honoured(block, swap, called)
    if not whole:
        check_honoured(
            block, swap, "its experts are called by the layer", honoured=("router", "top_k", "batch_invariant")
        )
    router, experts = (without_wrappers(getattr(block, name, None)) for name in (swap.live.router, "experts"))
    if swap.experts_apart:
        set_forward(
            experts, functools.partial(replaced_experts_forward, experts, type(experts), running_of(swap.config))
        )
    known = any(name == swap.live.router and child.cls is not None for name, child in swap.kind.children)
    if known and not swap.live.stateful and not has_own_forward(router, OURS):
        forward = functools.partial(router_forward, router, swap)
        if not whole:
            forward = functools.partial(gemma_router_forward, router, swap_of_router(swap, router))
        set_forward(router, forward)
    if whole:
        set_forward(block, functools.partial(block_forward, block, swap))
