"""Adapters in graphs: one graph for every token count, without reading values, and with the results of eager mode; with
torch.func and export too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

import moe_fn
from compile_tests.cases import CHUNK, FORMS
from compile_tests.graphs import graphs_of, ops, reading_values
from compile_tests.test_no_sync import assert_stays_on_cuda, on_fake_cuda
from compile_tests.test_one_graph import ATOMICS
from moe_fn import LoRAConfig, MoEConfig, MoEWeights
from moe_fn.testing import assert_matches, assert_one_graph, weights_for

TOKENS = (3, 0, 1, 2, 33)
KINDS = {
    "several": LoRAConfig(num_adapters=3, rank=2),
    "one that all share": LoRAConfig(num_adapters=1, rank=3, experts="shared"),
}


def config_of(kind: str = "several", form: str = "plain", **more: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=4, top_k=2, hidden_size=8, intermediate_size=6, lora=KINDS[kind], **FORMS[form], **more
    )


def args_of(config: MoEConfig, tokens: int) -> tuple[Any, ...]:
    """Returns (weights, x, logits, adapter_ids)."""
    generator = torch.Generator().manual_seed(tokens)
    x, logits = (torch.randn(tokens, n, generator=generator) for n in (8, 4))
    ids = torch.randint(-1, 3, (tokens,), generator=generator)
    return (
        weights_for(config, seed=1),
        x,
        logits,
        ids if config.lora is not None and config.lora.num_adapters > 1 else None,
    )


def layer_of(config: MoEConfig) -> Callable[..., Tensor]:
    return lambda weights, x, logits, ids: moe_fn.moe_forward(config, weights, x, logits, adapter_ids=ids)


@pytest.mark.parametrize(("kind", "form"), [*(("several", form) for form in FORMS), ("one that all share", "plain")])
def test_fullgraph_makes_one_graph_for_every_token_count(kind: str, form: str) -> None:
    config = config_of(kind, form)
    assert_one_graph(
        layer_of(config), lambda n: args_of(config, n), TOKENS, backward=True, backend="aot_eager", forbid=ATOMICS
    )


def test_plain_compile_makes_one_graph_for_every_token_count() -> None:
    config = config_of()
    assert_one_graph(
        layer_of(config), lambda n: args_of(config, n), TOKENS, fullgraph=False, backward=True, backend="aot_eager"
    )


def test_adapters_are_products_and_no_loop() -> None:
    """There are two products of the experts and two of the adapters of each projection, for any number of
    adapters, and an outer product for each.
    """
    config = config_of(backend="torch")
    weights = tree_map(lambda t: t.requires_grad_(t.is_floating_point()), weights_for(config, bias=False))
    graphs = graphs_of(layer_of(config), (weights, *args_of(config, 5)[1:]))
    assert ops(graphs.forward)["grouped_matmul"] == 6
    assert ops(graphs.backward)["grouped_outer"] == 6
    assert reading_values(graphs.all) == []


def test_adapters_on_a_gpu_never_wait_for_the_host() -> None:
    config = config_of()
    with FakeTensorMode(allow_non_fake_inputs=False):
        weights, *rest = on_fake_cuda(args_of(config, 9))
        assert_stays_on_cuda(make_fx(lambda *rest: layer_of(config)(weights, *rest))(*rest))


@pytest.mark.parametrize("form", ["plain", "opaque"])
def test_func_grad_and_vmap_compile(form: str) -> None:
    config = config_of(form=form)
    weights, x, logits, ids = args_of(config, CHUNK + 4)

    def loss(lora: Any, x: Tensor) -> Tensor:
        adapted = MoEWeights(gate_up=weights.gate_up, down=weights.down, lora=lora)
        return layer_of(config)(adapted, x, logits, ids).cos().sum()

    transformed = vmap(grad(loss), in_dims=(None, 0))
    args = weights.lora, torch.stack([x, 2 * x])
    assert_matches(
        torch.compile(transformed, backend="aot_eager", fullgraph=True)(*args),
        transformed(*args),
        tolerance=1e-5,
        scale=1.0,
    )


class Layer(nn.Module):
    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        self.config, self.weights = config, weights
        for number, leaf in enumerate(tree_leaves(weights)):
            self.register_buffer(f"leaf_{number}", leaf)

    def forward(self, x: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        return moe_fn.moe_forward(self.config, self.weights, x, logits, adapter_ids=ids)


def test_exported_adapters_take_any_number_of_tokens() -> None:
    config, tokens = config_of(), Dim("tokens", min=0, max=4096)
    weights, *rest = args_of(config, 7)
    program = torch.export.export(Layer(config, weights), tuple(rest), dynamic_shapes=({0: tokens},) * 3, strict=False)
    assert reading_values(program.graph_module) == []
    for count in (0, 1, 9):
        _, *args = args_of(config, count)
        assert_matches(program.module()(*args), layer_of(config)(weights, *args), tolerance=1e-5, scale=1.0)
