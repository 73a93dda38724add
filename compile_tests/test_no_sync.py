"""The layer has no synchronization between GPU and host: traced on fake CUDA tensors, and run in CUDA graphs
on a GPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from compile_tests.cases import HIDDEN, Case, as_leaves, cases
from compile_tests.graphs import Graphs, nodes, ops, reading_values
from moe_fn.kernels.torch import grouped as kernels
from moe_fn.ops.grouped_matmul import GROUPED, GroupedOps
from moe_fn.testing import assert_matches

BOTH = ("default", "everything")


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def on_fake_cuda(values: Any) -> Any:
    """Returns fake tensors of the same shapes on a GPU.

    They must never require a gradient: torch would abort the process.
    """
    return tree_map(
        lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t, values
    )


def assert_stays_on_cuda(*graphs: torch.fx.GraphModule) -> None:
    seen = 0
    for node in nodes(graphs):
        for value in tree_leaves(node.meta.get("val", node.meta.get("example_value"))):
            if isinstance(value, Tensor):
                assert value.device == torch.device("cuda:0"), node.format_node()
                seen += 1
    assert seen > 5
    assert reading_values(graphs) == []


@cases(BOTH)
def test_make_fx_sees_cuda_alone_and_no_sync(case: Case, fake: FakeTensorMode) -> None:
    weights, *rest = on_fake_cuda(case.args(9))
    assert_stays_on_cuda(make_fx(lambda *rest: case.layer(weights, *rest))(*rest))


@cases(BOTH)
def test_export_sees_cuda_alone_and_no_sync(case: Case, fake: FakeTensorMode) -> None:
    weights, *rest = on_fake_cuda(case.args(9))
    layer = case.layer

    class Layer(nn.Module):
        def forward(self, weights: Any, *rest: Any) -> Tensor:
            return layer(weights, *rest)

    assert_stays_on_cuda(torch.export.export(Layer(), (weights, *rest), strict=False).graph_module)


@cases(BOTH)
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "plain compile"])
def test_compile_sees_cuda_alone_and_no_sync(case: Case, fullgraph: bool, fake: FakeTensorMode) -> None:
    graphs = Graphs()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.dynamo.append(gm)
        return gm.forward

    args = on_fake_cuda(case.args(9))
    y = torch.compile(case.layer, backend=backend, fullgraph=fullgraph)(*args)
    assert y.device == torch.device("cuda:0") and y.shape == (9, HIDDEN)
    assert len(graphs.dynamo) == 1
    assert_stays_on_cuda(*graphs.dynamo)


@cases(BOTH, ("plain",))
def test_the_stages_and_the_blocked_kernels_together_have_no_sync(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of ops hide their kernels: in this graph the kernels that run on a GPU are traced instead of the ops."""
    monkeypatch.setitem(GROUPED, "torch", GroupedOps(kernels.grouped_matmul, kernels.grouped_outer))
    case = replace(case, backend="torch")
    with FakeTensorMode():
        weights, *rest = on_fake_cuda(case.args(9))
        graph = make_fx(lambda *rest: case.layer(weights, *rest))(*rest)
    assert not set(ops(graph)) & {"grouped_matmul", "grouped_outer"}
    assert any(node.target is torch.ops.aten.bmm.default for node in nodes(graph))
    assert_stays_on_cuda(graph)


def problem(
    tokens: int, segments: int, weight_sets: int, sizes: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Returns (rows, other rows, weights, ends). `sizes` are of the groups of all segments in order; the
    remaining rows of a segment are of no expert.
    """
    generator = torch.Generator().manual_seed(tokens)
    rows, other = (torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype) for width in (6, 5))
    experts = len(sizes) // segments
    weight = torch.randn(weight_sets * experts, 6, 5, generator=generator, dtype=torch.float64).to(dtype)
    first_rows = torch.arange(segments).unsqueeze(1) * (tokens // segments)
    ends = first_rows + torch.tensor(sizes).view(segments, experts).cumsum(1)
    return rows, other, weight, ends.flatten().to(torch.int32)


GROUPS = {
    "ragged": (300, 1, 1, [70, 1, 64, 65, 63, 37]),
    "with empty experts": (200, 1, 1, [0, 130, 0, 0, 70, 0]),
    "rows of no expert": (200, 1, 1, [10, 0, 100]),
    "all rows of no expert": (70, 1, 1, [0, 0, 0]),
    "no rows": (0, 1, 1, [0, 0, 0]),
    "one expert": (129, 1, 1, [129]),
    "more than one lot of blocks": (64 * 70, 1, 1, [64 * 35, 64 * 35 - 1]),
    "segments that share weights": (300, 3, 1, [40, 60, 100, 0, 0, 70]),
    "segments with their own weights": (300, 3, 3, [40, 60, 100, 0, 0, 70]),
    "two segments for each weight": (400, 4, 2, [40, 60, 100, 0, 0, 70, 33, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_blocked_products_equal_the_loop_over_experts(name: str, dtype: torch.dtype) -> None:
    tokens, segments, weight_sets, sizes = GROUPS[name]
    rows, other, weight, ends = problem(tokens, segments, weight_sets, sizes, dtype)
    expected = kernels.grouped_matmul(rows, weight, ends, False, segments, weight_sets)
    actual = kernels.blocked_matmul(rows, weight, ends, segments, weight_sets)
    assert_matches(actual, expected, name="matmul")
    transposed = weight.transpose(1, 2).contiguous()
    assert_matches(
        kernels.grouped_matmul(rows, transposed, ends, True, segments, weight_sets), expected, name="transposed"
    )
    outer = kernels.grouped_outer(rows, other, ends, segments, weight_sets)
    assert_matches(kernels.blocked_outer(rows, other, ends, segments, weight_sets), outer, name="outer")


@pytest.mark.parametrize("name", GROUPS)
def test_blocked_products_never_read_rows_of_no_expert(name: str) -> None:
    tokens, segments, weight_sets, sizes = GROUPS[name]
    rows, other, weight, ends = problem(tokens, segments, weight_sets, sizes)
    step = tokens // segments
    last = ends.view(segments, -1)[:, -1].tolist()
    of_no_expert = torch.tensor(
        [row >= last[min(row // max(step, 1), segments - 1)] for row in range(tokens)], dtype=torch.bool
    )
    rows[of_no_expert], other[of_no_expert] = torch.nan, torch.nan
    blocked = kernels.blocked_matmul(rows, weight, ends, segments, weight_sets)
    for product in (blocked, kernels.grouped_matmul(rows, weight, ends, False, segments, weight_sets)):
        assert product.isfinite().all()
        assert not product[of_no_expert].any()
    assert kernels.blocked_outer(rows, other, ends, segments, weight_sets).isfinite().all()
    assert kernels.grouped_outer(rows, other, ends, segments, weight_sets).isfinite().all()


@pytest.mark.parametrize(
    "name", ["ragged", "segments that share weights", "segments with their own weights", "no rows"]
)
def test_blocked_products_trace_on_cuda_without_a_sync(name: str, fake: FakeTensorMode) -> None:
    tokens, segments, weight_sets, sizes = GROUPS[name]
    experts = len(sizes) // segments
    rows, other = (torch.empty(tokens, width, device="cuda") for width in (6, 5))
    weight = torch.empty(weight_sets * experts, 6, 5, device="cuda")
    ends = torch.empty(len(sizes), dtype=torch.int32, device="cuda")
    transposed = torch.empty(weight_sets * experts, 5, 6, device="cuda")
    assert_stays_on_cuda(
        make_fx(lambda *args: kernels.grouped_matmul(*args, False, segments, weight_sets))(rows, weight, ends)
    )
    assert_stays_on_cuda(
        make_fx(lambda *args: kernels.grouped_matmul(*args, True, segments, weight_sets))(rows, transposed, ends)
    )
    assert_stays_on_cuda(make_fx(lambda *args: kernels.grouped_outer(*args, segments, weight_sets))(rows, other, ends))


def test_the_loop_over_experts_would_be_a_sync(fake: FakeTensorMode) -> None:
    """These tests detect a sync: the kernel of the CPU reads the ends."""
    ends = torch.empty(3, dtype=torch.int32, device="cuda")
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        make_fx(lambda ends: torch.empty(ends.tolist()[0]))(ends)


def on_cuda(values: Any) -> Any:
    return tree_map(lambda t: t.cuda() if isinstance(t, Tensor) else t, values)


@pytest.mark.gpu
@cases()
def test_the_layer_runs_on_a_gpu_while_syncs_are_errors(case: Case) -> None:
    args = as_leaves(on_cuda(case.args(100)))
    case.layer(*args).square().sum().backward()  # warm up: libraries initialise with syncs of their own
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.layer(*args).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(
        case.layer(*args),
        case.layer(*tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, args)),
        tolerance=1e-5,
    )


@pytest.mark.gpu
@cases(BOTH)
def test_a_cuda_graph_replays_with_other_routing(case: Case) -> None:
    static, layer = on_cuda(case.args(64)), case.layer
    with torch.no_grad():
        _warm_up(lambda: layer(*static))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(*static)
        for seed in (1, 2, 3):
            _refill(static[1:], on_cuda(case.token_args(64, seed=seed)))
            graph.replay()
            assert_matches(y, layer(*static), tolerance=1e-6)


@pytest.mark.gpu
@cases(BOTH)
def test_a_cuda_graph_of_forward_and_backward_replays_with_other_routing(case: Case) -> None:
    static, layer = as_leaves(on_cuda(case.args(64))), case.layer
    wanted = [t for t in tree_leaves(static) if isinstance(t, Tensor) and t.requires_grad]

    def step() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(layer(*static).square().sum(), wanted, allow_unused=True)

    _warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in (1, 2):
        with torch.no_grad():
            _refill(static[1:], on_cuda(case.token_args(64, seed=seed)))
        graph.replay()
        for got, want in zip(found, step(), strict=True):
            assert_matches(got, want, tolerance=1e-5, scale=1e-3)


@pytest.mark.gpu
@cases(BOTH, ("plain", "opaque"))
def test_compiled_with_cuda_graphs_the_layer_gives_the_numbers_of_eager(case: Case) -> None:
    compiled = torch.compile(case.layer, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in (0, 1, 2, 3):
            args = case.weights(), *case.token_args(64, seed=seed)
            args = on_cuda(args)
            assert_matches(compiled(*args).clone(), case.layer(*args), tolerance=1e-5)


def _warm_up(fn: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)


def _refill(static: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    for place, value in zip(static, values, strict=True):
        if place is not None:
            place.copy_(value)
