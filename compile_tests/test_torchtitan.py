"""torchtitan's layer with moe_fn's experts and dispatcher: one graph, forward and backward, for any number of rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fn
import shared_tests.torchtitan_interface as stated
from compile_tests.graphs import graphs_of, new_sizes, ops, reading_values
from moe_fn.integrations.torchtitan import replace_grouped_experts
from moe_fn.testing import assert_one_graph

ATOMICS = ("aten.index_add", "aten.index_put", "aten._unsafe_index_put", "aten.scatter_reduce")
kinds = pytest.mark.parametrize("kind", stated.KINDS)


def swapped(kind: Any, dtype: torch.dtype | None = None) -> Any:
    moe = stated.build_moe(kind, shared=stated.FeedForward, bias=True, route_norm=True).eval()
    replace_grouped_experts(moe, compute_dtype=dtype)
    return moe


def rows_and_counts(rows: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(stated.SIZES.experts, dtype=torch.int64)
    counts[:2] = torch.tensor([rows // 3, rows - rows // 3])
    return torch.randn(rows, stated.SIZES.dim), counts


@kinds
def test_experts_are_one_graph_for_every_number_of_rows(kind: Any) -> None:
    experts = swapped(kind).routed_experts.inner_experts
    assert_one_graph(experts, rows_and_counts, (3, 0, 1, 2, 65), backward=True, backend="aot_eager", forbid=ATOMICS)


@kinds
def test_the_graphs_of_experts_hold_products_and_read_no_values(kind: Any) -> None:
    experts = swapped(kind).routed_experts.inner_experts
    rows, counts = rows_and_counts(9)
    moe_fn.mark_tokens(rows.requires_grad_())
    graphs = graphs_of(experts, (rows, counts))
    assert len(graphs.dynamo) == len(graphs.forward) == len(graphs.backward) == 1
    assert reading_values(graphs.all) == []
    assert [new_sizes(gm) for gm in graphs.all] == [set(), set(), set()]
    products = {name.removesuffix("_native"): count for name, count in ops(graphs.forward).items()}
    biases = 2 if kind is stated.GptOssGroupedExperts else 0
    assert products == {"grouped_matmul": (3 if kind is stated.GroupedExperts else 2) + biases}
    joins = [n for n in graphs.forward[0].graph.nodes if n.target is torch.ops.aten.cat.default]
    assert all(n.meta["val"].ndim == 2 for n in joins), "weights are joined in every call"


@kinds
def test_inductor_gives_the_numbers_and_gradients_of_eager(kind: Any) -> None:
    experts = swapped(kind).routed_experts.inner_experts
    rows, counts = rows_and_counts(40)
    rows.requires_grad_()
    inputs = [rows, *experts.parameters()]
    results = []
    for function in (experts, torch.compile(experts, fullgraph=True)):
        y = function(rows, counts)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_the_whole_layer_is_one_graph_for_every_number_of_tokens() -> None:
    moe = swapped(stated.GroupedExperts, torch.bfloat16)

    def layer(x_TD: Tensor) -> Tensor:
        return moe(x_TD.unsqueeze(0)).squeeze(0)

    make = lambda tokens: (torch.randn(tokens, stated.SIZES.dim),)
    assert_one_graph(layer, make, (3, 0, 1, 2, 65), backward=True, backend="aot_eager", forbid=ATOMICS)


@pytest.mark.filterwarnings("ignore:.*CPU autocast.*")
def test_the_real_layer_compiles_to_one_graph() -> None:
    moe: nn.Module = stated.real_built(stated.real_moe(score_func="sigmoid")).eval()
    replace_grouped_experts(moe)
    x = torch.randn(2, 9, stated.SIZES.dim, requires_grad=True)
    graphs = graphs_of(moe, (x,))
    assert len(graphs.dynamo) == len(graphs.forward) == len(graphs.backward) == 1
    assert reading_values(graphs.all) == []
