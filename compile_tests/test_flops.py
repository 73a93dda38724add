"""torch.utils.flop_counter counts the products of the experts exactly, in whichever op they run."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import moe_fn
from compile_tests.cases import CHUNK, FORMS, HIDDEN, INTERMEDIATE, NUM_EXPERTS, Case, as_leaves
from compile_tests.test_op_contracts import COLLECTIVES, OPS
from moe_fn import MoEConfig, QuantConfig, Routing, add_lora, make_lora, quantize_weights

TOKENS, TOP_K = 20, 2
OF_DOWN = 2 * TOKENS * TOP_K * HIDDEN * INTERMEDIATE
EXPERTS = 3 * OF_DOWN  # gate, up, down
BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"])
WITHOUT_PRODUCTS = {
    "moe_fn::elementwise", "moe_fn::gather_rows", "moe_fn::route_top_k_native", "moe_fn::route_top_k_triton",
}  # fmt: skip


def counted(function: Any, *args: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


def layer_of(config: MoEConfig) -> Any:
    return partial(moe_fn.moe_forward, config)


def test_every_op_with_products_has_a_formula() -> None:
    known = {f"moe_fn::{packet.__name__}" for packet in flop_registry if str(packet).startswith("moe_fn.")}
    assert known == set(OPS) - COLLECTIVES - WITHOUT_PRODUCTS


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_are_counted(form: str, backend: Any) -> None:
    case = Case("default", form, backend)
    weights, x, logits, _ = as_leaves(case.args(TOKENS))
    forward, y = counted(case.layer, weights, x, logits)
    assert forward == EXPERTS
    backward, _ = counted(y.sum().backward)
    again = EXPERTS if form != "plain" else 0  # chunks and opaque layers compute the forward again
    # and chunks of the fused op its first product
    again += 2 * OF_DOWN if backend == "native" and "chunked" in form else 0
    assert backward == 2 * EXPERTS + again


@BACKENDS
def test_what_is_not_asked_for_is_not_counted(backend: Any) -> None:
    case = Case("default", backend=backend)
    weights, x, logits, _ = as_leaves(case.args(TOKENS))
    loss = case.layer(weights, x, logits).sum()
    assert counted(torch.autograd.grad, loss, x)[0] == EXPERTS


def test_recomputing_is_counted() -> None:
    config = replace(Case("default", backend="native").config, recompute=True)
    weights, x, logits, _ = as_leaves(Case("default").args(TOKENS))
    loss = layer_of(config)(weights, x, logits).sum()
    assert counted(loss.backward)[0] == 2 * EXPERTS + 2 * OF_DOWN


@BACKENDS
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_products_with_codes_are_counted_as_products(scheme: Any, backend: Any) -> None:
    case = Case("default", backend=backend)
    weights, x, logits, _ = case.args(TOKENS)
    config, weights = quantize_weights(
        case.config, weights, QuantConfig(scheme=scheme, granularity="group", group_size=4)
    )
    forward, y = counted(layer_of(config), weights, x.requires_grad_(), logits)
    assert (forward, counted(y.sum().backward)[0]) == (EXPERTS, EXPERTS)  # codes have no gradients


@BACKENDS
@pytest.mark.parametrize("rank", [1, 3])
def test_adapters_are_counted(rank: int, backend: Any) -> None:
    case = Case("default", backend=backend)
    weights, x, logits, _ = case.args(TOKENS)
    matrix = partial(torch.zeros, NUM_EXPERTS)
    gate_up, down = (
        (matrix(rank, HIDDEN), matrix(2 * INTERMEDIATE, rank)),
        (matrix(rank, INTERMEDIATE), matrix(HIDDEN, rank)),
    )
    config, weights = add_lora(case.config, weights, [make_lora(gate_up=gate_up, down=down, alpha=1.0)])
    of_adapters = 2 * TOKENS * TOP_K * rank * (HIDDEN + 2 * INTERMEDIATE + INTERMEDIATE + HIDDEN)
    forward, y = counted(layer_of(config), replace(weights, lora=as_leaves(weights.lora)), x, logits)
    assert forward == EXPERTS + of_adapters
    # Frozen experts have no gradients: the gradient of the second adapter's input goes back through down, that of the
    # first one does not go to x. The fused op computes products with A again, for it does not save them.
    again = 2 * TOKENS * TOP_K * rank * (HIDDEN + INTERMEDIATE) if backend == "native" else 0
    assert counted(y.sum().backward)[0] == OF_DOWN + 2 * of_adapters - 2 * TOKENS * TOP_K * rank * HIDDEN + again


@BACKENDS
def test_rows_of_no_expert_are_not_counted_where_ids_have_values(backend: Any) -> None:
    case = Case("default", backend=backend)
    weights, x, _, _ = case.args(TOKENS)
    ids = torch.tensor([[0, -1], [NUM_EXPERTS - 1, 3]]).repeat(TOKENS // 2, 1)
    routing = Routing(expert_ids=ids, weights=torch.ones(TOKENS, TOP_K))
    run = partial(moe_fn.moe_forward_routed, case.config)
    assert counted(run, weights, x, routing)[0] == EXPERTS * 3 // 4
    with FakeTensorMode() as mode:
        fake = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, (weights, x, routing))
        assert counted(run, *fake)[0] == EXPERTS


@pytest.mark.parametrize("form", ["plain", "opaque"])
def test_meta_tensors_and_inference_mode_are_counted(form: str) -> None:
    case = Case("default", form)
    args = case.args(TOKENS)
    assert counted(case.layer, *tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, args))[0] == EXPERTS
    with torch.inference_mode():
        assert counted(case.layer, *args)[0] == EXPERTS


def test_everything_beside_the_experts_is_counted_inside_an_opaque_layer_too() -> None:
    plain, opaque = (Case("deepseek", form) for form in ("plain", "opaque"))
    args = plain.args(CHUNK)
    assert counted(plain.layer, *args)[0] == counted(opaque.layer, *args)[0] > EXPERTS * CHUNK // TOKENS


# A finder and loader of an application. One loader is for all modules, as in frozen applications; and other finders
# are called through importlib, as in import hooks.
APPLICATION = """
class Frozen(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    loaders, busy = {}, False

    def find_spec(self, name, path, target=None):
        if self.busy or name not in ("torch.utils.flop_counter", "colorsys"):
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        self.busy = False
        self.loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.loaders[module.__name__].exec_module(module)

frozen = Frozen()
sys.meta_path.insert(1, frozen)
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_formulas_follow_a_table_that_is_imported_later(frozen: bool) -> None:
    code = f"""
import importlib, importlib.abc, importlib.util, sys, threading
import moe_fn, torch
assert not [name for name in sys.modules if name == "torch.utils.flop_counter" or name.split(".")[0] == "triton"]
{APPLICATION if frozen else ""}
assert importlib.util.find_spec("torch.utils.flop_counter")  # somebody asks whether it is there
threads = [threading.Thread(target=importlib.import_module, args=("torch.utils.flop_counter",)) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
import colorsys
import torch.utils.flop_counter as table
loader = frozen if {frozen} else colorsys.__loader__
assert type(table.__loader__) is type(table.__spec__.loader) is type(loader)
for table in (table,) if {frozen} else (table, importlib.reload(table)):
    assert torch.ops.moe_fn.grouped_matmul in table.flop_registry
    assert torch.ops.moe_fn.moe_backward in table.flop_registry
"""
    subprocess.run([sys.executable, "-c", code], check=True)
