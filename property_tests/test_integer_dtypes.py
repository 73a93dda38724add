"""Ids of experts, tokens and adapters, maps of slots and loads: each public function has the same result for every
integer dtype that can represent them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import law
from torch import Tensor
from torch.utils._pytree import tree_leaves

import moe_fn
from moe_fn import LoRAConfig, MoEConfig, RouterConfig, Routing, balance
from moe_fn.config import ZeroExpertsConfig
from moe_fn.kernels.native import library as native
from moe_fn.kernels.triton import support as gpu
from moe_fn.testing import weights_for

# The most experts that int8, or uint8, can represent: the ids of no expert, -1 and num_experts, and sums do not fit.
EXPERTS = {torch.uint8: 256, torch.int8: 128}
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64)
TOKENS = 5
Door = Callable[[Callable[[Tensor], Tensor], int, int], Any]
KNOWN: dict[tuple[Any, ...], Any] = {}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids_of(experts: int, seed: int) -> Tensor:
    """Returns ids of two distinct experts for each token, among them the first and the last expert."""
    ids = torch.stack([torch.randperm(experts, generator=generator(seed + row))[:2] for row in range(TOKENS)])
    return torch.cat([torch.tensor([[0, experts - 1]]), ids[1:]])


def mask_of(seed: int) -> Tensor:
    return torch.rand(TOKENS, generator=generator(seed)) < 0.8


def layer(experts: int, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[MoEConfig, Any, Tensor]:
    """Returns a config, its weights (made once) and x."""
    config = MoEConfig(num_experts=experts, top_k=2, hidden_size=3, intermediate_size=2, **changes)
    if (config, dtype) not in KNOWN:
        KNOWN[config, dtype] = (
            weights_for(config, dtype=dtype),
            torch.randn(TOKENS, 3, generator=generator(1)).to(dtype),
        )
    return config, *KNOWN[config, dtype]


def routed(dtype: torch.dtype = torch.float32, **changes: Any) -> Door:
    """Returns calls of moe_forward_routed, with and without padding, and with adapter ids if the layer has adapters."""

    def door(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
        config, weights, x = layer(experts, dtype, **changes)
        adapters = None if config.lora is None else narrow(torch.arange(TOKENS) % (config.lora.num_adapters + 1))
        w = torch.rand(TOKENS, 2, generator=generator(seed))
        routing = Routing(expert_ids=narrow(ids_of(experts, seed)), weights=w, adapter_ids=adapters)
        given = (config, weights, x, routing)
        return moe_fn.moe_forward_routed(*given), moe_fn.moe_forward_routed(*given, token_mask=mask_of(seed))

    return door


def stages(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
    config, weights, x = layer(experts, lora=LoRAConfig(num_adapters=2, rank=1))
    adapters = narrow(torch.arange(TOKENS) % 3)
    w = torch.rand(TOKENS, 2, generator=generator(seed))
    routing = Routing(expert_ids=narrow(ids_of(experts, seed)), weights=w, adapter_ids=adapters)
    dispatched = moe_fn.dispatch(config, x, routing)
    rows = moe_fn.experts(config, weights, dispatched)
    return dispatched, rows, moe_fn.combine(config, rows, dispatched, routing)


def hashed(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
    config, weights, x = layer(experts, router=RouterConfig(selection="hash"))
    router = dataclasses.replace(weights.router, expert_ids_of_token=narrow(weights.router.expert_ids_of_token))
    weights, ids = dataclasses.replace(weights, router=router), narrow(torch.arange(TOKENS))
    logits = torch.randn(TOKENS, experts, generator=generator(seed))
    y, stats = moe_fn.moe_forward_with_stats(config, weights, x, logits, token_ids=ids)
    return y, stats, moe_fn.route(config, weights, logits, token_ids=ids)


def replayed(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
    config, weights, _ = layer(experts)
    logits = torch.randn(TOKENS, experts, generator=generator(seed))
    return moe_fn.route_to(config, weights, logits, narrow(ids_of(experts, seed)), token_mask=mask_of(seed))


def balanced(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
    ids, mask, scores = (
        narrow(ids_of(experts, seed)),
        mask_of(seed),
        torch.rand(TOKENS, experts, generator=generator(seed)),
    )
    losses = [balance.load_balancing_loss(scores, ids, m) for m in (None, mask)]
    return (
        balance.expert_load(ids, experts),
        losses,
        balance.sequence_balancing_loss(scores[None], ids[None], mask[None]),
    )


def placed(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
    """Converts ids with more slots than the dtype can represent, and positions of tokens."""
    placement = balance.placement_of_slots(torch.tensor([*range(experts), 0, experts - 1, 0]), num_experts=experts)
    return balance.physical_ids(placement, narrow(ids_of(experts, seed)), narrow(torch.arange(TOKENS))).to(torch.int64)


def maps(narrow: Callable[[Tensor], Tensor], experts: int, seed: int) -> Any:
    """Converts placements and loads in the dtype: few experts, and loads whose sum does not fit."""
    placement = balance.placement_of_slots(narrow(torch.tensor([2, 0, 1, 1, 1])), num_experts=3)
    tensors = {f.name: getattr(placement, f.name) for f in dataclasses.fields(placement)}
    signed = narrow(torch.zeros(1)).dtype.is_signed
    narrowed = balance.Placement(
        **{name: t if (t < 0).any() and not signed else narrow(t) for name, t in tensors.items()}
    )
    load = narrow(torch.tensor([100, 90, 120, 110, 127]))
    ids = torch.randint(-1, 3, (TOKENS, 2), generator=generator(seed))
    return (
        placement, balance.physical_ids(narrowed, ids), balance.logical_load(narrowed, load),
        balance.gpu_load(narrowed, load[:3], 1),
        balance.physical_weights(layer(3)[1], narrowed), balance.balancedness(load),
        balance.update_correction_bias(torch.zeros(5), load, 1.0),
        balance.total(balance.push(balance.load_window(1, 5), load)), balance.place_experts(load[:3], 6, 1, 1, 2),
        balance.transfers(narrowed, placement, 1).copies,
    )  # fmt: skip


DOORS: dict[str, Door] = {
    "torch": routed(backend="torch"),
    "float16": routed(torch.float16),
    "float64": routed(torch.float64),
    "weights on the input": routed(router=RouterConfig(weight_on="input", renormalize=False)),
    "chunks": routed(chunk_tokens=2, backend="torch"),
    "opaque": routed(opaque=True, backend="torch"),
    "zero experts": routed(zero_experts=ZeroExpertsConfig(count=2, kind="constant")),
    "lora": routed(lora=LoRAConfig(num_adapters=2, rank=1)),
    "batch invariant": routed(batch_invariant=True, backend="torch"),
    "stages": stages,
    "hash": hashed,
    "replay": replayed,
    "balance": balanced,
    "placement": placed,
    "maps": maps,
}
if native.active().problem is None:
    DOORS["native"] = routed(backend="native")
INTERPRETED = gpu.problem("cpu", torch.float32) is None


def check(door: Door, dtype: torch.dtype, seed: int) -> None:
    experts = EXPERTS.get(dtype, 300)
    found, expected = door(lambda t: t.to(dtype), experts, seed), door(lambda t: t, experts, seed)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) if isinstance(b, Tensor) else a == b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_every_integer_dtype_is_right_at_every_door(door: str, dtype: torch.dtype) -> None:
    check(DOORS[door], dtype, seed=0)


@law(st.sampled_from(sorted(DOORS)), st.sampled_from(DTYPES), st.integers(0, 2**20))
def test_ids_of_any_integer_dtype_are_the_same_ids(door: str, dtype: torch.dtype, seed: int) -> None:
    check(DOORS[door], dtype, seed)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter does not run here")
@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.uint16), ids=str)
def test_every_integer_dtype_is_right_in_triton(dtype: torch.dtype) -> None:
    check(routed(backend="triton"), dtype, seed=0)


def test_a_compiled_layer_takes_narrow_ids() -> None:
    config, weights, x = layer(256, backend="torch")
    ids, w = ids_of(256, 3).to(torch.uint8), torch.rand(TOKENS, 2, generator=generator(3))
    given = (config, weights, x, Routing(expert_ids=ids, weights=w))
    y = torch.compile(moe_fn.moe_forward_routed, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(y, moe_fn.moe_forward_routed(*given))


def test_ids_too_large_for_int64_are_nobodys() -> None:
    config, weights, x = layer(3)
    ids = torch.tensor([[2**64 - 1, 2**63]] * TOKENS, dtype=torch.uint64)
    assert not moe_fn.moe_forward_routed(
        config, weights, x, Routing(expert_ids=ids, weights=torch.ones(TOKENS, 2))
    ).any()


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32, torch.complex64, torch.uint4), ids=str)
def test_what_is_no_integer_is_refused_in_words(dtype: torch.dtype) -> None:
    config, weights, x = layer(3)
    ids = torch.empty(TOKENS, 2, dtype=dtype)
    routing = Routing(expert_ids=ids, weights=torch.ones(TOKENS, 2))
    placement = balance.placement_of_slots(torch.tensor([0, 1, 2]), num_experts=3)
    for call in (
        lambda: moe_fn.moe_forward_routed(config, weights, x, routing),
        lambda: moe_fn.dispatch(config, x, routing),
        lambda: moe_fn.route_to(config, weights, torch.zeros(TOKENS, 3), ids),
        lambda: balance.expert_load(ids, 3),
        lambda: balance.load_balancing_loss(torch.ones(TOKENS, 3), ids),
        lambda: balance.physical_ids(placement, ids),
    ):
        with pytest.raises(ValueError, match="expected an integer dtype"):
            call()
