"""One graph for every token count, forward and backward, without graph breaks and without reading values."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import moe_fn
from compile_tests.cases import (
    FORMS,
    GATE_INSIDE,
    HIDDEN,
    IN_STAGES_AND_IN_ONE_OP,
    KINDS,
    RECIPES,
    Case,
    as_leaves,
    cases,
    every_case,
)
from compile_tests.graphs import Graphs, graphs_of, new_sizes, nodes, ops, reading_values
from moe_fn import MoEConfig, MoEWeights, RouterConfig, Routing
from moe_fn.kernels.native.support import router_problem
from moe_fn.testing import assert_matches, assert_one_graph, count_graphs, weights_for

TOKENS = (3, 0, 1, 2, 7, 64, 65)
ATOMICS = ("aten.index_add", "aten.index_put", "aten._unsafe_index_put", "aten.scatter_reduce")
WHOLE_LAYER = {"moe_forward", "moe_forward_shared", "moe_backward"}
either = pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "plain compile"])
all_forms = pytest.mark.parametrize("form", FORMS)


@cases()
def test_fullgraph_makes_one_graph_for_every_token_count(case: Case) -> None:
    assert_one_graph(case.layer, case.args, TOKENS, backward=True, backend="aot_eager", forbid=ATOMICS)


@cases(("everything",), often=[("everything", "plain")])  # Dynamo cannot break inside one op
def test_plain_compile_makes_one_graph_for_every_token_count(case: Case) -> None:
    assert_one_graph(case.layer, case.args, TOKENS, fullgraph=False, backward=True, backend="aot_eager", forbid=ATOMICS)


@pytest.mark.parametrize("case", [Case("everything"), Case("deepseek", "opaque_chunked")], ids=str)
def test_inductor_makes_one_graph_for_every_token_count(case: Case) -> None:
    assert_one_graph(case.layer, case.args, (3, 0, 1, 2, 65), backward=True)


@all_forms
def test_one_graph_serves_a_thousand_tokens_and_eight_thousand(form: str) -> None:
    case = Case("default", form)
    config = case.config if case.config.chunk_tokens is None else replace(case.config, chunk_tokens=512)

    def layer(*args: Any) -> Tensor:
        return moe_fn.moe_forward(config, *args)

    assert_one_graph(layer, lambda tokens: case.args(tokens)[:3], (3, 1000, 8192, 1, 0), backend="aot_eager")
    assert_one_graph(layer, lambda tokens: case.args(tokens)[:3], (3, 1000, 0), backend="aot_eager", backward=True)


@cases(("default",), often=IN_STAGES_AND_IN_ONE_OP)
@either
def test_unmarked_tokens_add_only_the_graphs_that_torch_makes_for_0_and_1(case: Case, fullgraph: bool) -> None:
    calls = [as_leaves(case.args(tokens)) for tokens in (3, 7, 1, 0, 2, 40)]
    counts = count_graphs(case.layer, calls, fullgraph=fullgraph, backend="aot_eager")
    assert counts.graphs <= 4, counts
    assert counts.breaks == 0, counts


@cases()
def test_explain_finds_no_reason_to_break(case: Case) -> None:
    explanation = torch._dynamo.explain(case.layer)(*as_leaves(case.args(9)))
    assert explanation.break_reasons == []
    assert explanation.graph_count == 1


@all_forms
def test_equal_configs_share_a_graph_and_other_configs_do_not(form: str) -> None:
    config = Case("everything", form).config
    twin = MoEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    other = replace(config, router=replace(config.router, routed_scaling_factor=2.5))
    assert twin == config and twin is not config
    weights, x, _, mask = Case("everything").args(9)

    def layer(config: MoEConfig) -> Tensor:
        return moe_fn.moe_forward(config, weights, x, token_mask=mask)

    assert count_graphs(layer, [(config,), (twin,), (config,)]).graphs == 1
    assert count_graphs(layer, [(config,), (other,), (twin,), (other,)]).graphs == 2


GRAPHED = [
    pytest.param(
        case, fullgraph, id=f"{case}-{'fullgraph' if fullgraph else 'plain compile'}",
        marks=[pytest.mark.thorough] * ((case.recipe, case.form) not in (KINDS if fullgraph else KINDS[:1])),
    )
    for fullgraph in (True, False)
    for case in every_case(tuple(RECIPES) if fullgraph else ("default",))
]  # fmt: skip


@pytest.mark.parametrize(("case", "fullgraph"), GRAPHED)
def test_graphs_hold_the_ops_of_their_form_and_never_read_values(case: Case, fullgraph: bool) -> None:
    args = as_leaves(case.args(9))
    moe_fn.mark_tokens(*args[1:])
    graphs = graphs_of(case.layer, args, fullgraph=fullgraph)
    assert len(graphs.dynamo) == len(graphs.forward) == len(graphs.backward) == 1
    assert reading_values(graphs.all) == []
    assert [new_sizes(gm) for gm in graphs.all] == [set(), set(), set()]
    (assert_aten_and_one_kernel if case.form == "plain" else assert_one_node)(case, graphs)


def assert_aten_and_one_kernel(case: Case, graphs: Graphs) -> None:
    """Checks that the graph has the op of the native kernels, and its backward; without kernels, and with
    expert_norm, it has grouped products.
    """
    if case.config.expert_norm is not None or not moe_fn.backends()[1].available:
        return assert_aten_and_grouped_products(case, graphs)
    more = {"grouped_matmul_native": 1} if case.recipe in GATE_INSIDE else {}
    more |= {"route_top_k_native": 1} if _routed_by_op(case) else {}
    assert ops(graphs.dynamo) == ops(graphs.forward) == {"routed_experts_native": 1} | more
    assert ops(graphs.backward)["routed_experts_backward_native"] == 1
    if case.recipe == "default":
        assert ops(graphs.backward) == {"routed_experts_backward_native": 1}


def _routed_by_op(case: Case) -> bool:
    router = case.args(9)[0].router
    scaled = router is not None and router.expert_scale is not None
    return not scaled and router_problem(case.config.json, torch.float32) is None


@cases(("default", "deepseek"), ("plain",), often=[("default", "plain")])
def test_the_torch_back_end_is_aten_and_grouped_products(case: Case) -> None:
    args = as_leaves(case.args(9))
    moe_fn.mark_tokens(*args[1:])
    assert_aten_and_grouped_products(case, graphs_of(replace(case, backend="torch").layer, args, fullgraph=True))


def assert_aten_and_grouped_products(case: Case, graphs: Graphs) -> None:
    def grouped(of: Any) -> dict[str, int]:
        found = {name.removesuffix("_native"): count for name, count in ops(of).items()}
        return {name: count for name, count in found.items() if name != "route_top_k"}

    assert set(grouped(graphs.dynamo)) == {"grouped_matmul", "gather_rows"}
    # gather_rows is index_select here, which Inductor fuses
    assert set(grouped(graphs.forward)) == {"grouped_matmul"}
    assert set(grouped(graphs.backward)) == {"grouped_matmul", "grouped_outer"}
    if case.recipe == "default":
        assert grouped(graphs.forward) == {"grouped_matmul": 2}
        assert grouped(graphs.backward) == {"grouped_matmul": 2, "grouped_outer": 2}


def assert_one_node(case: Case, graphs: Graphs) -> None:
    """Checks that the whole layer is one op, also with chunks: a scan would disable the compile caches."""
    whole = [{name: count for name, count in ops(gm).items() if name in WHOLE_LAYER} for gm in graphs.all]
    assert whole == [{"moe_forward": 1}, {"moe_forward": 1}, {"moe_backward": 1}]
    if "opaque" in case.form:
        assert [ops(gm) for gm in graphs.all] == whole  # there is no other op of the package: routing is inside too
    assert torch.ops.higher_order.scan not in [node.target for node in nodes(graphs.all)]


@cases(("everything",), ("opaque",))
def test_the_opaque_form_with_shared_output_is_one_node_too(case: Case) -> None:
    graphs = graphs_of(_shared(case), as_leaves(case.args(9)))
    assert ops(graphs.forward) == {"moe_forward_shared": 1}
    assert ops(graphs.backward) == {"moe_backward": 1}


def _with_stats(case: Case) -> Callable[..., Any]:
    config = case.config
    return lambda weights, x, logits, mask: moe_fn.moe_forward_with_stats(config, weights, x, logits, token_mask=mask)


def _shared(case: Case) -> Callable[..., Any]:
    config = case.config
    return lambda weights, x, logits, mask: moe_fn.moe_forward_shared(config, weights, x, logits, token_mask=mask)


# Each entry in stages; with shared_output, which has its own op, also in one op.
OTHER_ENTRIES = [
    pytest.param(
        Case("everything", form), make, id=f"{make.__name__}-everything-{form}",
        marks=[pytest.mark.thorough] * (form != "plain" and (make, form) != (_shared, "opaque")),
    )
    for make in (_with_stats, _shared)
    for form in FORMS
]  # fmt: skip


@pytest.mark.parametrize(("case", "make"), OTHER_ENTRIES)
def test_the_other_entries_are_one_graph(case: Case, make: Callable[[Case], Callable[..., Any]]) -> None:
    assert_one_graph(make(case), case.args, (3, 0, 1, 20), backward=True, backend="aot_eager", forbid=ATOMICS)


@cases(("everything",), often=[("everything", "plain")])
def test_the_layer_behind_a_router_of_your_own_is_one_graph(case: Case) -> None:
    config = case.config

    def make_args(tokens: int) -> tuple[Any, ...]:
        weights, x, _, mask = case.args(tokens)
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(-1, config.num_choices, (tokens, config.top_k), generator=generator)
        return weights, x, ids, torch.rand(tokens, config.top_k, generator=generator), mask

    def layer(weights: MoEWeights, x: Tensor, ids: Tensor, w: Tensor, mask: Tensor | None) -> Tensor:
        return moe_fn.moe_forward_routed(config, weights, x, Routing(expert_ids=ids, weights=w), token_mask=mask)

    assert_one_graph(layer, make_args, (3, 0, 1, 20), backward=True, backend="aot_eager", forbid=ATOMICS)


def test_a_replayed_choice_is_one_graph() -> None:
    case = Case("everything")
    config = case.config

    def make_args(tokens: int) -> tuple[Any, ...]:
        return *case.args(tokens), torch.randint(-1, config.num_choices, (tokens, config.top_k), dtype=torch.int16)

    def layer(weights: MoEWeights, x: Tensor, logits: Tensor | None, mask: Tensor | None, ids: Tensor) -> Tensor:
        logits, _ = moe_fn.moe_route(config, weights, x, logits, token_mask=mask)
        return moe_fn.moe_forward_routed(
            config, weights, x, moe_fn.route_to(config, weights, logits, ids, token_mask=mask)
        )

    assert_one_graph(layer, make_args, (3, 0, 1, 20), backward=True, backend="aot_eager", forbid=ATOMICS)


OTHER_ROUTERS = {
    "hash": RouterConfig(selection="hash", scoring="sigmoid"),
    "sparsemixer": RouterConfig(selection="sparsemixer", renormalize=False),
    "weight on input": RouterConfig(scoring="sigmoid", renormalize=False, weight_on="input"),
}


@pytest.mark.parametrize("name", OTHER_ROUTERS)
@pytest.mark.parametrize("form", ["plain", pytest.param("opaque_chunked", marks=pytest.mark.thorough)])
def test_other_routers_are_one_graph(name: str, form: str) -> None:
    router = OTHER_ROUTERS[name]
    config = replace(Case("default", form).config, router=router, top_k=1 if router.weight_on == "input" else 2)
    weights = weights_for(config)

    def make_args(tokens: int) -> tuple[Any, ...]:
        ids = torch.arange(tokens) % 16 if router.selection == "hash" else None
        return weights, *Case("default").token_args(tokens)[:2], ids

    def layer(weights: MoEWeights, x: Tensor, logits: Tensor, token_ids: Tensor | None) -> Tensor:
        return moe_fn.moe_forward(config, weights, x, logits, token_ids=token_ids)

    assert_one_graph(layer, make_args, (3, 0, 1, 20), backward=True, backend="aot_eager", forbid=ATOMICS)


@pytest.mark.parametrize("form", ["plain", pytest.param("chunked", marks=pytest.mark.thorough), "opaque_chunked"])
def test_leading_dimensions_stay_one_graph(form: str) -> None:
    case = Case("everything", form)
    config, counter = case.config, CompileCounterWithBackend("aot_eager")
    layer = torch.compile(case.layer, backend=counter, fullgraph=True)
    # not 0: torch guards on the strides of [2, 0, H], which are unusual, and makes another graph
    for length in (5, 1, 12):
        weights, x, _, mask = case.args(2 * length)
        x, mask = x.view(2, length, HIDDEN), mask.view(2, length)
        expected = moe_fn.moe_forward(config, weights, x, token_mask=mask)
        moe_fn.mark_tokens(x, mask, dim=1)
        actual = layer(weights, x, None, mask)
        assert actual.shape == x.shape
        assert torch.equal(actual, expected)
    assert counter.frame_count == 1


class Model(torch.nn.Module):
    """Layers with norms, residuals and mixing of tokens by their sum; the last layer has the config and weights of the
    first one.
    """

    def __init__(self, configs: list[MoEConfig]) -> None:
        super().__init__()
        weights = [weights_for(config, seed=seed, requires_grad=True) for seed, config in enumerate(configs)]
        self.layers = [*zip(configs, weights, strict=True), (configs[0], weights[0])]
        self.mix = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in self.layers)
        self.tensors = [t for t in torch.utils._pytree.tree_leaves(weights) if t.requires_grad] + list(
            self.parameters()
        )

    def forward(self, x: Tensor) -> Tensor:
        for (config, weights), mix in zip(self.layers, self.mix, strict=True):
            x = x + mix(torch.nn.functional.rms_norm(x, (HIDDEN,)).sum(0, keepdim=True) / 16)
            x = x + moe_fn.moe_forward(config, weights, torch.nn.functional.rms_norm(x, (HIDDEN,)))
        return x

    def gradients(self, y: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(y.square().sum(), self.tensors, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self.tensors, found, strict=True)]


MODELS = [
    pytest.param("plain", "aot_eager", ("deepseek", "gpt_oss"), marks=pytest.mark.thorough),
    ("plain", "aot_eager", ("default",)),
    ("opaque_chunked", "aot_eager", ("deepseek", "gpt_oss")),
    pytest.param("chunked", "aot_eager", ("deepseek",), marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("form", "backend", "recipes"), MODELS)
def test_a_model_of_several_layers_is_one_graph(form: str, backend: str, recipes: tuple[str, ...]) -> None:
    model = Model([Case(recipe, form).config for recipe in recipes])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tokens in (9, 0, 1, 40):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        expected = model(x)
        wanted = model.gradients(expected)
        moe_fn.mark_tokens(x)
        actual = compiled(x)
        found = model.gradients(actual)
        assert_matches(actual, expected, tolerance=1e-5)
        assert_matches(found, wanted, tolerance=1e-4, scale=1e-2)
        assert_matches(model.gradients(compiled(x)), found, tolerance=0.0, name="once more")
    assert counter.frame_count == 1
