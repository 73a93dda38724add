"""Offsets above int32: kernels compute the same for tensors with strides that put their last rows above 2^31 elements.

Untouched memory is not allocated: a tensor takes 4 GB of addresses, and one page for each of its rows.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_native import RUNNABLE
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, MoEWeights, QuantConfig, Routing
from moe_fn.stages._checks import MOST_SLOTS
from moe_fn.testing import weights_for

FAR = 2**30 + 64  # elements between neighbours: the third one starts after 2^31
EXPERTS, HIDDEN, INNER = 8200, 512, 256  # gate_up: 8200 * 2 * 256 * 512 elements
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def far(t: Tensor) -> Tensor:
    """Returns the same tensor with a stride of FAR in its first dim."""
    storage = torch.empty((t.shape[0] - 1) * FAR + t[0].numel(), dtype=t.dtype)
    return storage.as_strided(t.shape, (FAR, *t[:1].contiguous().stride()[1:])).copy_(t)


def triton_calls() -> dict[str, Callable[[Callable[[Tensor], Tensor]], Any]]:
    """Returns calls of kernels by name; each takes a function that changes the strides of a tensor."""
    from moe_fn.config.activation import PRESETS
    from moe_fn.kernels.triton.metadata import sort_slots
    from moe_fn.kernels.triton.outer import grouped_outer, segment_sums
    from moe_fn.kernels.triton.products import grouped_product
    from moe_fn.kernels.triton.small_batch import down_of_slots, up_of_slots
    from moe_fn.kernels.triton.tiles import Tile
    from moe_fn.kernels.triton.up import up

    generator = torch.Generator().manual_seed(0)
    x, weight, down = (torch.randn(shape, generator=generator).half() for shape in ((3, 16), (3, 16, 32), (3, 16, 16)))
    ids, silu, tile, w = (
        torch.tensor([[0, 2], [2, 1], [1, 0]]),
        PRESETS["silu"],
        Tile(16, 16, 16, 1, 1),
        torch.rand(3, 2, generator=generator),
    )
    w, (slots, (tile_map,)) = torch.rand(3, 2, generator=generator), sort_slots(ids, 3, (16,))
    activated, starts, ends = (
        torch.randn(6, 16, generator=generator).half(),
        torch.tensor([0, 2]).int(),
        torch.tensor([2, 3]).int(),
    )
    return {
        "up": lambda lay: up(lay(x), slots, tile_map, lay(weight), None, silu, False, True, tile),
        "grouped_product": lambda lay: grouped_product(activated, lay(down), slots.starts[1:], tile_map, tile),
        "grouped_outer": lambda lay: grouped_outer(lay(x), lay(x), starts, ends, tile),
        "segment_sums": lambda lay: segment_sums(lay(x), starts, ends),
        "up_of_slots": lambda lay: up_of_slots(lay(x), ids, lay(weight), None, silu, False, tile),
        "down_of_slots": lambda lay: down_of_slots(activated, ids, w, lay(down), None, torch.float16, tile),
    }


@needs_triton
@pytest.mark.parametrize(
    "kernel", ["up", "grouped_product", "grouped_outer", "segment_sums", "up_of_slots", "down_of_slots"]
)
def test_triton_kernels_reach_beyond_int32(kernel: str) -> None:
    call = triton_calls()[kernel]
    found, expected = call(far), call(torch.clone)
    for f, e in zip(*(torch.utils._pytree.tree_leaves(t) for t in (found, expected)), strict=True):
        assert torch.equal(f, e) and e.abs().sum() > 0


def one_far_expert(config: MoEConfig, small: MoEWeights) -> MoEWeights:
    """Returns weights of many experts: the last has those of the single expert of `small`, the others are
    uninitialized.
    """

    def spread(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        many = torch.empty(config.num_experts, *t.shape[1:], dtype=t.dtype)
        many[-1:] = t
        return many

    made: MoEWeights = torch.utils._pytree.tree_map(spread, small)
    assert made.gate_up.numel() > 2**31
    return made


@pytest.mark.skipif(not RUNNABLE, reason="no native kernels here")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("quant", [None, QuantConfig(scheme="int8", granularity="channel")], ids=["bfloat16", "int8"])
def test_native_kernels_reach_beyond_int32(quant: QuantConfig | None, prepared: bool) -> None:
    one, many = (
        MoEConfig(num_experts=n, top_k=1, hidden_size=HIDDEN, intermediate_size=INNER, quant=quant, backend="native")
        for n in (1, EXPERTS)
    )
    small = weights_for(one, 0, bias=False, dtype=torch.bfloat16)
    small = moe_fn.prepare_weights(one, small) if prepared else small
    x, w = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.ones(3, 1)
    expected = moe_fn.moe_forward_routed(
        one, small, x, Routing(expert_ids=torch.zeros(3, 1, dtype=torch.int64), weights=w)
    )
    last = Routing(expert_ids=torch.full((3, 1), EXPERTS - 1), weights=w)
    found = moe_fn.moe_forward_routed(many, one_far_expert(many, small), x, last)
    assert torch.equal(found, expected) and expected.abs().sum() > 0


def on_meta(tokens: int) -> Tensor:
    """Runs a layer on the meta device."""
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=8, backend="torch")
    weights = torch.utils._pytree.tree_map(lambda t: t.to("meta"), weights_for(config))
    y: Tensor = moe_fn.moe_forward(
        config, weights, torch.empty(tokens, 16, device="meta"), torch.empty(tokens, 4, device="meta")
    )
    return y


def test_sizes_beyond_int32_are_fine_and_slots_beyond_it_an_error() -> None:
    """Rows are counted in int32 (`expert_ends`): tensors may have 2^31 elements, but not 2^31 slots."""
    assert on_meta(2**30 - 1).shape == (2**30 - 1, 16)
    with pytest.raises(
        ValueError, match=rf"x has 1073741824 tokens, 2147483648 slots with top_k=2; expected at most {MOST_SLOTS}"
    ):
        on_meta(2**30)
