"""Balancing of experts in a step: ids to slots, the layer on slots, loads back to experts, and the window of loads.

The step is one graph without a sync.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import moe_fn
from compile_tests.graphs import nodes, reading_values
from moe_fn import MoEConfig, MoEWeights, ZeroExpertsConfig, balance
from moe_fn.balance import LoadWindow, Placement
from moe_fn.testing import assert_one_graph, weights_for

LOGICAL = MoEConfig(
    num_experts=8, top_k=2, hidden_size=16, intermediate_size=12, zero_experts=ZeroExpertsConfig(count=1)
)
PHYSICAL = replace(LOGICAL, num_experts=12)
TOKENS = (3, 0, 1, 2, 7, 64, 65)
ARGS = tuple[MoEWeights, Placement, LoadWindow, Tensor, Tensor, Tensor]


def args(tokens: int) -> ARGS:
    placement = balance.place_experts(torch.tensor([30, 2, 4, 9, 1, 1, 2, 17]), 12, 1, 1, 4)
    weights = balance.physical_weights(replace(weights_for(LOGICAL), router=None), placement)
    window = balance.push(balance.load_window(4, 8), torch.arange(8))
    generator = torch.Generator().manual_seed(tokens)
    x, logits = (torch.randn(tokens, size, generator=generator) for size in (16, 9))
    return weights, placement, window, x, logits, torch.arange(tokens) + 5


def step(
    weights: MoEWeights, placement: Placement, window: LoadWindow, x: Tensor, logits: Tensor, index: Tensor | None
) -> Any:
    """Returns the layer's output on physical slots, and the window with its load."""
    routing = moe_fn.route(LOGICAL, weights, logits)
    routing = replace(routing, expert_ids=balance.physical_ids(placement, routing.expert_ids, index))
    load = balance.logical_load(placement, balance.expert_load(routing.expert_ids, PHYSICAL.num_experts))
    window = balance.push(window, load)
    per_gpu = balance.gpu_load(placement, balance.total(window), 4)
    return moe_fn.moe_forward_routed(PHYSICAL, weights, x, routing), window, balance.balancedness(per_gpu)


@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "plain compile"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_balanced_step_is_one_graph_for_every_token_count(fullgraph: bool, indexed: bool) -> None:
    def layer(*values: Any) -> Any:
        return step(*values[:-1], values[-1] if indexed else None)

    assert_one_graph(layer, args, TOKENS, fullgraph=fullgraph, backend="aot_eager")


def test_inductor_and_gradients_agree() -> None:
    assert_one_graph(
        lambda *values: step(*values)[0],
        args,
        (3, 0, 1, 65),
        backward=True,
        forbid=("aten.index_add", "aten.index_put"),
    )


def test_ids_with_leading_dimensions_are_one_graph() -> None:
    placement = args(0)[1]

    def ids(tokens: int) -> tuple[Tensor]:
        return (torch.arange(tokens * 6).view(tokens, 3, 2) % 9 - 1,)

    assert_one_graph(lambda ids: balance.physical_ids(placement, ids), ids, TOKENS, backend="aot_eager")


def test_a_balanced_step_never_waits_for_the_device() -> None:
    real = args(9)  # placement reads values on the host
    with FakeTensorMode():
        fake = tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), real)
        graph = make_fx(step)(*fake)
    assert reading_values(graph) == []
    values = [node.meta["val"] for node in nodes(graph) if isinstance(node.meta.get("val"), Tensor)]
    assert len(values) > 20
    assert {str(value.device) for value in values} == {"cuda:0"}
