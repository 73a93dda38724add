"""Whole models of transformers on moe_fn: one graph, forward and backward, in every dtype; generation and export."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.export import Dim

transformers = pytest.importorskip("transformers")

from compile_tests.graphs import graphs_of, name_of, nodes, ops  # noqa: E402
from moe_fn.integrations.transformers import experts, register  # noqa: E402
from moe_fn.testing import assert_matches, assert_one_graph  # noqa: E402
from shared_tests.transformers_experts import module_of, own_class, randomised, settings_of_experts, tokens_of  # noqa: E402
from shared_tests.transformers_models import make_model, make_token_ids  # noqa: E402

register()

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# functions that read values on the host
READS = {"nonzero", "_local_scalar_dense", "bincount", "item", "unique_consecutive", "equal"}
THEIRS = ("transformers", "aten._grouped_mm", "aten.bmm", "aten.histc")


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits
    return found


def gradients(model: Any, y: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of parameters that have one."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direction = torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    found = torch.autograd.grad((y * direction).sum(), list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


def assert_same(model: Any, function: Callable[..., Any], ids: Tensor, marked: Tensor, tolerance: float) -> None:
    """Checks that logits of the compiled function, and gradients if enabled, are those of the model."""
    y, wanted = logits(function, marked), logits(model, ids)
    assert_matches(y, wanted, tolerance=tolerance, name="logits")
    if not y.requires_grad:
        return
    actual, expected = gradients(model, y), gradients(model, wanted)
    assert actual.keys() == expected.keys() and any("expert" in name for name in actual)
    for name in expected:
        assert_matches(actual[name], expected[name], tolerance=2 * tolerance, scale=1e-3, name=name)


def assert_one_model_graph(model: Any, tolerance: float, backend: str = "aot_eager") -> None:
    """Checks that fullgraph compiles one graph for different batches and lengths, with the results of eager mode."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)  # type: ignore[arg-type]
    function = torch.compile(model, backend=counter, fullgraph=True)
    for batch, length in ((2, 5), (3, 9)):
        ids = make_token_ids(length, batch, length)
        marked = ids.clone()
        torch._dynamo.mark_dynamic(marked, 0)
        torch._dynamo.mark_dynamic(marked, 1)
        assert_same(model, function, ids, marked, tolerance)
    assert counter.frame_count == 1 and not counters["graph_break"]


# Packed halves; interleaved with biases; a bias and groups for the choice, and a dense layer.
# Attention takes most of the time: in make test one whole model, and the experts modules of the others (MODULES).
WHOLE = (
    pytest.param("qwen3_moe", torch.float16, marks=pytest.mark.thorough),
    ("gpt_oss", torch.bfloat16),
    pytest.param("deepseek_v3", torch.float32, marks=pytest.mark.thorough),
)


@pytest.mark.parametrize("name, dtype", WHOLE)
def test_whole_models_are_one_graph_for_every_length_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    assert_one_model_graph(make_model(name, seed=0, experts_implementation="moe_fn").to(dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("minimax_m3_vl", marks=pytest.mark.thorough)])
def test_inference_is_one_graph_for_every_length(name: str) -> None:
    with torch.no_grad():
        assert_one_model_graph(make_model(name, seed=0, experts_implementation="moe_fn"), TOLERANCES[torch.float32])


# With the native kernels, bfloat16 like float16.
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=[pytest.mark.thorough] * (d == torch.bfloat16), id=str(d)) for d in TOLERANCES]
)
def test_every_dtype_is_one_graph_of_our_ops_alone(dtype: torch.dtype) -> None:
    model = make_model("gpt_oss", seed=0, experts_implementation="moe_fn", layers=1).to(dtype)
    graphs = graphs_of(partial(logits, model), (make_token_ids(3),))
    assert [len(graphs.dynamo), len(graphs.forward), len(graphs.backward)] == [1, 1, 1]
    found = {name_of(node) for node in nodes(graphs.all)}
    assert not [name for name in found if name.startswith("transformers")], "an op of transformers is in the graph"
    assert not READS & {name.split(".")[1] for name in found if name.startswith("aten.")}, "the host waits for values"
    layers, forward = model.config.num_hidden_layers, ops(graphs.forward)
    assert forward["routed_experts_native"] == layers


def test_a_compiled_model_generates_the_same_tokens() -> None:
    """The prompt is one call; then tokens are generated one by one with cached keys and values."""
    model = make_model("qwen3_moe", seed=0, experts_implementation="moe_fn", layers=1)
    ids = make_token_ids(5)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)


MODULES = (
    "MixtralExperts",
    "DeepseekV4Experts",
    "Inkling2Experts",
    "Lfm2MoeExperts",
    "NemotronHExperts",
    "MuseSparkExperts",
)


@pytest.mark.parametrize("name", MODULES)
def test_experts_modules_are_one_graph_for_every_count_of_tokens(name: str) -> None:
    one_graph(module_of(name))


def test_inductor_computes_what_eager_does() -> None:
    one_graph(module_of("GptOssExperts"), backend="inductor")


# A custom gate, an activation with parameters, a gate of the usual form with other constants; functions.
OWN = (
    ("own", "silu"),
    ("default", "prelu"),
    ("nearly", "mish"),
    *(pytest.param("default", act, marks=pytest.mark.thorough) for act in ("lambda", "F.gelu")),
)


@pytest.mark.parametrize("gate, act", OWN)
def test_modules_that_compute_their_own_gate_are_one_graph(gate: str, act: str) -> None:
    cls = own_class(gate, act, has_bias=True, is_transposed=False, has_gate=True, norm=gate == "own")
    one_graph(randomised(cls(settings_of_experts()), torch.float32))


def one_graph(module: Any, backend: Any = "aot_eager") -> None:
    """Checks one graph of the module as a function of its parameters and the arguments of its block, with sentinels."""
    module.config._experts_implementation = "moe_fn"

    def layer(parameters: dict[str, Tensor], x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(module, parameters, (x, ids, w))
        return y

    def args(tokens: int) -> tuple[Any, ...]:
        given = tokens_of(module, tokens, strangers=(module.num_experts,))
        return {name: p.detach() for name, p in module.named_parameters()}, given.x, given.ids, given.w

    assert_one_graph(layer, args, tokens=(3, 0, 1, 9), backward=True, backend=backend, forbid=THEIRS, scale=0.1)


def test_numbers_of_layers_may_differ_and_equal_layers_share_a_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for limit, graphs in ((0.7, 1), (0.7, 1), (0.2, 2), (3, 3), (0.7, 3), (0.2, 3)):
        module = module_of("GptOssExperts")
        module.limit, module.config._experts_implementation = limit, "moe_fn"
        given = tokens_of(module)
        y = torch.compile(module, backend=counter, fullgraph=True)(given.x, given.ids, given.w)
        assert torch.equal(y, module(given.x, given.ids, given.w))
        assert counter.frame_count == graphs


def test_configs_are_made_once() -> None:
    module = module_of("GptOssExperts")
    module.config._experts_implementation = "moe_fn"
    given = tokens_of(module)
    module(given.x, given.ids, given.w)
    before = dict(experts._CONFIGS)
    twin = copy.deepcopy(module)
    torch.compile(twin, backend="eager", fullgraph=True)(given.x, given.ids, given.w)
    assert experts._CONFIGS.keys() == before.keys() and all(
        experts._CONFIGS[key] is config for key, config in before.items()
    )


def test_a_model_exports_and_its_lengths_range() -> None:
    model = make_model("qwen3_moe", seed=0, experts_implementation="moe_fn")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return logits(self.model, ids)

    shapes = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(Logits(), (make_token_ids(1, 3, 7),), dynamic_shapes=shapes, strict=False)
        assert ops(program.graph_module)["routed_experts_native"] == model.config.num_hidden_layers
        for batch, length in ((1, 2), (2, 9)):
            ids = make_token_ids(length, batch, length)
            assert_matches(program.module()(ids), logits(model, ids), tolerance=1e-5)
