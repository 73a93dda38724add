"""Whole models with replaced blocks: one graph for every length, forward and backward, in every dtype, and exported."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from moe_fn.integrations.transformers import replace_moe_blocks
from moe_fn.testing import assert_matches
from shared_tests.hung_on_modules import hang
from shared_tests.transformers_models import make_model, make_token_ids
from shared_tests.zoo import ROWS, make_block, make_input

# Groups and shared experts, biases and interleaved, clamps and hash layers, states between layers; True: thorough.
# Attention takes most of the time: in make test one whole model, and the blocks of the others.
MODELS = {"deepseek_v3": True, "gpt_oss": False, "deepseek_v4": True, "zaya": True}
BLOCKS = ("deepseek_v3-groups-scaled", "deepseek_v4-hash-limit-bites", "zaya-with-states")
LOW = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def replaced(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = make_model(name, seed=0).to(dtype)
    assert replace_moe_blocks(model).replaced
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits
    return found


def compiled(model: Any, backend: str, fullgraph: bool = True) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)  # type: ignore[arg-type]
    return torch.compile(model, backend=counter, fullgraph=fullgraph), counter


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * thorough) for name, thorough in MODELS.items()]
)
def test_a_replaced_model_is_one_graph_for_every_length_forward_and_backward(name: str) -> None:
    model = replaced(name)
    function, counter = compiled(model, "aot_eager")
    for batch, length in ((2, 5), (3, 9)):
        ids = make_token_ids(length, batch, length)
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        y, wanted = logits(function, ids), logits(model, make_token_ids(length, batch, length))
        assert_matches(y, wanted, tolerance=1e-5, name="logits")
        weights = [
            p
            for n, p in model.named_parameters()
            if p.requires_grad and ("expert" in n or "gate" in n or "router" in n)
        ]
        found, expected = (torch.autograd.grad(out.square().sum(), weights, allow_unused=True) for out in (y, wanted))
        for actual, right in zip(found, expected, strict=True):
            assert (actual is None) == (right is None)
            if right is not None:
                assert_matches(actual, right, tolerance=1e-4, scale=1e-3)
    assert counter.frame_count == 1 and not counters["graph_break"]


def token_ids_of(block: Any, x: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(x[..., 0].numel()).view(x.shape[:2]) % block.gate.tid2eid.shape[0]}


def states_of(block: Any, x: Tensor) -> dict[str, Tensor]:
    return {"prev_router_hidden_states": x[..., : block.gate.router_hidden_size].cos()}


EXTRA_INPUTS: dict[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "hidden": lambda block, x: {},
    "input_ids": token_ids_of,
    "router_states": states_of,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_replaced_block_is_one_graph_for_every_length_forward_and_backward(name: str) -> None:
    row = next(row for row in ROWS if row.name == name)
    block = make_block(row, 0)
    inputs = [make_input(row, seed, batch, seq) for seed, batch, seq in ((0, 2, 5), (1, 3, 9))]
    assert replace_moe_blocks(block).replaced
    function, counter = compiled(block, "aot_eager")
    for input in inputs:
        results = []
        for run in (function, block):
            x, more = input.clone().requires_grad_(), EXTRA_INPUTS[row.takes](block, input)
            for t in (x, *more.values()) if run is function else ():
                torch._dynamo.mark_dynamic(t, 0)
                torch._dynamo.mark_dynamic(t, 1)
            y = run(x, **more)
            y = y[0] if isinstance(y, tuple) else y
            wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
            results.append([y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)])
        for actual, right in zip(*results, strict=True):
            assert (actual is None) == (right is None)
            if right is not None:
                assert_matches(actual, right, tolerance=1e-4, scale=1e-3)
    assert counter.frame_count == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=[pytest.mark.thorough] * (d != torch.float32), id=str(d)) for d in LOW]
)
def test_a_replaced_model_compiles_with_inductor_in_every_dtype(dtype: torch.dtype) -> None:
    model, ids = replaced("deepseek_v3", dtype), make_token_ids(3)
    function, counter = compiled(model, "inductor", fullgraph=False)
    with torch.no_grad():
        assert_matches(logits(function, ids).float(), logits(model, ids).float(), tolerance=LOW[dtype], name="logits")
    assert counter.frame_count == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "way", ["adapter", *(pytest.param(way, marks=pytest.mark.thorough) for way in ("parametrization", "own class"))]
)
def test_an_adapter_that_comes_after_compiling_is_seen_in_one_graph(way: str) -> None:
    row = next(row for row in ROWS if row.name == "deepseek_v3-groups-scaled")
    block, x = make_block(row, 0), make_input(row, 1)
    assert replace_moe_blocks(block).replaced
    function, counter = compiled(block, "aot_eager")
    before = function(x)
    hang(block, "gate", way)
    assert_matches(function(x), block(x), tolerance=1e-5)
    assert not torch.allclose(block(x), before)
    assert counter.frame_count == 2 and not counters["graph_break"]


def test_a_replaced_model_is_exported() -> None:
    model, ids = replaced("qwen3_moe"), make_token_ids(3)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return logits(self.model, ids)

    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(Logits(), (ids,), dynamic_shapes={"ids": {1: length}}, strict=False)
    other = make_token_ids(4, 2, 9)
    with torch.no_grad():
        assert_matches(exported.module()(other), logits(model, other), tolerance=1e-5)
