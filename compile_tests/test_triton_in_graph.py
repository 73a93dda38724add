"""The Triton back-end in graphs: graphs have its ops, one graph is for every token count, and no launch waits for the
device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_fn
from compile_tests.cases import Case, as_leaves
from compile_tests.graphs import graphs_of, ops
from moe_fn import ActivationQuantConfig, MoEWeights, QuantConfig
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.arguments import DIFFERENTIABLE, RoutedExpertsArguments, flat
from moe_fn.kernels.triton import support as gpu
from moe_fn.records import QuantWeights
from moe_fn.testing import assert_matches, assert_one_graph

if gpu.problem("cpu", torch.float32):
    pytest.skip("the Triton kernels run on the CPU only under Triton's interpreter", allow_module_level=True)

CASES = [Case("default", backend="triton"), Case("deepseek", backend="triton"), Case("gpt_oss", backend="triton")]


def args_of(case: Case, tokens: int) -> tuple[Any, ...]:
    """Returns arguments without scales of experts, which the router kernel does not support."""
    weights, *rest = case.args(tokens)
    router = None if weights.router is None else replace(weights.router, expert_scale=None)
    return replace(weights, router=router), *rest


each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize(
    ("case", "fullgraph"),
    [
        pytest.param(
            case, fullgraph, id=f"{case}-{'fullgraph' if fullgraph else 'plain compile'}",
            # Dynamo traces the same of every recipe but for the router, which deepseek has most of.
            marks=[pytest.mark.thorough] * ((case.recipe, fullgraph) not in (("deepseek", True), ("default", False))),
        )
        for case in CASES
        for fullgraph in (True, False)
    ],
)  # fmt: skip
def test_the_graph_holds_the_ops_of_the_back_end(case: Case, fullgraph: bool) -> None:
    args = as_leaves(args_of(case, 4))
    moe_fn.mark_tokens(*args[1:])
    graphs = graphs_of(case.layer, args, fullgraph=fullgraph)
    assert len(graphs.dynamo) == len(graphs.forward) == len(graphs.backward) == 1
    assert ops(graphs.forward) == {"routed_experts_triton": 1, "route_top_k_triton": 1}
    assert ops(graphs.backward) == {"routed_experts_backward_triton": 1}


def assert_one_graph_of(case: Case, backward: bool, tokens: tuple[int, ...], backend: Any) -> None:
    def make_args(tokens: int) -> tuple[Any, ...]:
        args = args_of(case, tokens)
        return tuple(as_leaves(args)) if backward else args

    assert_one_graph(case.layer, make_args, tokens, backward=backward, backend=backend, tolerance=1e-5, scale=0.1)


# The interpreter takes most of the time. Backward runs the forward too: groups and a shared expert, biases and
# interleaved halves. Forward only: Inductor compiles the ops without gradients.
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_one_graph_serves_every_token_count_backward(case: Case) -> None:
    assert_one_graph_of(case, True, (3, 0, 1), "aot_eager")


def test_one_graph_serves_every_token_count_forward() -> None:
    assert_one_graph_of(CASES[0], False, (3, 0, 1), "inductor")


@pytest.mark.thorough
@each
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_one_graph_serves_more_token_counts(case: Case, backward: bool) -> None:
    assert_one_graph_of(case, backward, (3, 0, 1, 2, 40), "inductor")


def test_an_exported_layer_gives_the_same_numbers() -> None:
    case = CASES[0]  # torch's guard code confuses `gate_up` and `gate_up_bias`
    layer = case.layer

    class Layer(nn.Module):
        def forward(self, weights: MoEWeights, x: Tensor, logits: Tensor) -> Tensor:
            return layer(weights, x, logits)

    args = args_of(case, 4)[:3]
    program = torch.export.export(Layer(), args, strict=False)
    assert_matches(program.module()(*args), layer(*args), tolerance=1e-6)


def test_an_expert_norm_runs_by_the_grouped_products_of_the_back_end() -> None:
    case = Case("everything", backend="triton")
    graphs = graphs_of(case.layer, as_leaves(case.args(3)), fullgraph=True)
    assert ops(graphs.forward)["grouped_matmul_triton"] >= 2


@contextmanager
def launches_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records launches on fake CUDA tensors; all operations around the kernels run.

    A sync would raise.
    """
    from triton.runtime.interpreter import InterpretedFunction

    from moe_fn.kernels.triton import grouped, layer
    from moe_fn.kernels.triton.quant import layer as quant_layer
    from moe_fn.kernels.triton.quant import products as quant_products
    from moe_fn.kernels.triton.quant import up as quant_up

    launched: list[str] = []

    def launcher(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: launched.append(self.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launcher)
    for module in (grouped, layer, quant_layer, quant_products, quant_up):
        monkeypatch.setattr(module, "architecture_of", lambda device: "sm_90")
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield launched


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def arguments(
    *tensors: Tensor, biases: tuple[Tensor | None, Tensor | None] = (None, None), quant: QuantConfig | None = None,
    scales: QuantWeights | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Returns arguments of routed_experts: x, expert_ids, expert_weights, gate_up and down, and optional ones."""
    x, ids, w, gate_up, down = tensors
    return flat(
        RoutedExpertsArguments(
            x=x, expert_ids=ids, expert_weights=w, gate_up=gate_up, down=down, gate_up_bias=biases[0],
            down_bias=biases[1], quant_weights=scales, adapter_ids=None, lora=None,
            intermediate_size=down.shape[2], transposed=True,
            interleaved=False, quant="" if quant is None else quant.json, invariant=False, activation=PRESETS["silu"],
        )
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "launches"), [(1, 2), (100, 4), (4096, 6)])
def test_launches_of_a_forward_and_no_sync(tokens: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fn.kernels.triton import entry

    with launches_counted(monkeypatch) as launched:
        args = (
            cuda(tokens, 32),
            cuda(tokens, 2, dtype=torch.int64),
            cuda(tokens, 2, dtype=torch.float32),
            cuda(16, 128, 32),
            cuda(16, 32, 64),
        )
        y, _ = entry.routed_experts(*arguments(*args), False)
        assert y.shape == (tokens, 32) and y.device.type == "cuda"
    assert len(launched) == launches, launched


FP8 = {"scheme": "fp8_e4m3"}
BLOCK = {"granularity": "block", "block_shape": (128, 128)}


@pytest.mark.parametrize(
    ("quant", "few", "many"),  # launches for 100 tokens and for 16,384, of which one and three sort
    [
        (QuantConfig(**FP8, **BLOCK), 4, 6),
        (
            QuantConfig(**FP8, **BLOCK, activations=ActivationQuantConfig(**FP8, granularity="group", group_size=128)),
            6,
            7,
        ),  # with many tokens the first product stores codes
        (QuantConfig(**FP8, granularity="tensor", activations=ActivationQuantConfig(**FP8, granularity="token")), 6, 8),
        (
            QuantConfig(
                **FP8, granularity="tensor", activations=ActivationQuantConfig(**FP8, granularity="tensor", static=True)
            ),
            5,
            7,
        ),
    ],
)
@pytest.mark.parametrize("tokens", [100, 16384])
def test_launches_of_a_quantized_forward_and_no_sync(
    quant: QuantConfig, few: int, many: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_fn.kernels.triton import entry

    with launches_counted(monkeypatch) as launched:
        args = cuda(tokens, 256), cuda(tokens, 2, dtype=torch.int64), cuda(tokens, 2, dtype=torch.float32)
        codes = cuda(2, 256, 256, dtype=torch.float8_e4m3fn), cuda(2, 256, 128, dtype=torch.float8_e4m3fn)
        tiles = 1 if quant.granularity == "tensor" else 2
        scales = cuda(2, 2, tiles, dtype=torch.float32), cuda(2, tiles, 1, dtype=torch.float32)
        static = cuda(2, dtype=torch.float32) if quant.activations is not None and quant.activations.static else None
        leaves = QuantWeights(
            gate_up_scale=scales[0], down_scale=scales[1], gate_up_input_scale=static, down_input_scale=static
        )
        y, _ = entry.routed_experts(*arguments(*args, *codes, quant=quant, scales=leaves), False)
        assert y.shape == (tokens, 256) and y.device.type == "cuda"
    assert len(launched) == (few if tokens == 100 else many), launched


@pytest.mark.parametrize("kept", [True, False])
def test_a_backward_has_no_sync(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fn.kernels.triton import entry

    with launches_counted(monkeypatch) as launched:
        args = (
            cuda(100, 32),
            cuda(100, 2, dtype=torch.int64),
            cuda(100, 2, dtype=torch.float32),
            cuda(16, 128, 32),
            cuda(16, 32, 64),
        )
        biases = cuda(16, 128), cuda(16, 32)
        pre = cuda(200, 128) if kept else cuda(0)
        needed = [True] * len(DIFFERENTIABLE)
        found = entry.routed_experts_backward(cuda(100, 32), needed, pre, *arguments(*args, biases=biases))
        given = (args[0], *args[2:], *biases)
        assert [g.shape for g in found] == [*(a.shape for a in given), *[(0,)] * (len(needed) - len(given))]
        assert all(g.device.type == "cuda" for g in found)
    assert ("_up_kernel" in launched) != kept


def test_grouped_products_have_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fn.kernels.triton import entry

    with launches_counted(monkeypatch):
        ends = cuda(6, dtype=torch.int32)
        for segments, sets in ((1, 1), (2, 1), (2, 2)):
            weight = cuda(6 // segments * sets, 32, 64)
            assert entry.grouped_matmul(cuda(100, 32), weight, ends, False, segments, sets, False).shape == (100, 64)
            assert entry.grouped_outer(cuda(100, 32), cuda(100, 64), ends, segments, sets).shape == weight.shape


def test_the_router_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fn.kernels.triton import entry

    config = replace(Case("deepseek").config)
    with launches_counted(monkeypatch) as launched:
        weights, ids = entry.route_top_k(cuda(7, 8), cuda(8, dtype=torch.float32), config.json)
        assert ids.shape == weights.shape == (7, 2)
    assert len(launched) == 1
