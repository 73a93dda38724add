"""Quantized layers, and LoRA on them: one graph, the same results exported and ahead of time, and gradients
of x, router and adapters only.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fn
from moe_fn import ActivationQuantConfig, LoRAConfig, MoEConfig, MoEWeights, QuantConfig
from moe_fn.testing import assert_matches, assert_one_graph, weights_for

TOKENS = (3, 0, 1, 2, 7, 65)
BASE = MoEConfig(num_experts=4, top_k=2, hidden_size=32, intermediate_size=32)
QUANTS = {
    "int4 with zero points": QuantConfig(scheme="int4", granularity="group", group_size=8, zero_points=True),
    "int8 by token": QuantConfig(
        scheme="int8", granularity="channel", activations=ActivationQuantConfig(scheme="int8", granularity="token")
    ),
    "fp8 blocks": QuantConfig(
        scheme="fp8_e4m3",
        granularity="block",
        block_shape=(16, 16),
        activations=ActivationQuantConfig(
            scheme="fp8_e4m3", granularity="group", group_size=16, power_of_two_scales=True
        ),
    ),
    "mxfp4": QuantConfig(scheme="mxfp4", granularity="group", group_size=32),
    "nvfp4": QuantConfig(
        scheme="nvfp4",
        granularity="group",
        group_size=16,
        activations=ActivationQuantConfig(scheme="nvfp4", granularity="group", group_size=16, static=True),
    ),
}


def layer_of(name: str, lora: bool = False, **more: Any) -> tuple[MoEConfig, MoEWeights]:
    config = dataclasses.replace(
        BASE, quant=QUANTS[name], lora=LoRAConfig(num_adapters=1, rank=2) if lora else None, **more
    )
    weights = weights_for(config, seed=2, scales=False)
    return config, weights


def trained(weights: MoEWeights) -> MoEWeights:
    """Returns weights whose adapters, router and biases require gradients; quantized weights cannot."""
    quant = weights.quant
    weights = torch.utils._pytree.tree_map(
        lambda t: t.detach().clone().requires_grad_(t.dtype == torch.float32), weights
    )
    return dataclasses.replace(weights, quant=quant)


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x, logits = torch.randn(tokens, 32, generator=generator), torch.randn(tokens, 4, generator=generator)
    return x.requires_grad_(), logits.requires_grad_()


# Codes of weights alone, of inputs too, and by blocks with power-of-two scales. mxfp4 is in test_adapters below; nvfp4
# has scales above its scales.
_PLAIN = [("int4 with zero points", False), pytest.param("nvfp4", False, marks=pytest.mark.thorough)]
_ONE_GRAPH = [
    *((name, True) for name in QUANTS if name != "mxfp4"),
    pytest.param("mxfp4", True, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("name", "fullgraph"), [*_ONE_GRAPH, *_PLAIN])
def test_quantized_layers_are_one_graph(name: str, fullgraph: bool) -> None:
    config, weights = layer_of(name)
    assert_one_graph(
        lambda w, x, logits: moe_fn.moe_forward(config, w, x, logits),
        lambda tokens: (trained(weights), *inputs(tokens)),
        TOKENS,
        fullgraph=fullgraph,
        backward=True,
        backend="aot_eager",
    )


_LONG = pytest.param("mxfp4", {"chunk_tokens": 4}, marks=pytest.mark.thorough)
_ADAPTED = [("mxfp4", {}), ("int8 by token", {"opaque": True}), _LONG]


@pytest.mark.parametrize(("name", "form"), _ADAPTED)
def test_adapters_on_quantized_experts_train_in_one_graph(name: str, form: dict[str, Any]) -> None:
    config, weights = layer_of(name, lora=True, **form)
    assert_one_graph(
        lambda w, x, logits: moe_fn.moe_forward(config, w, x, logits),
        lambda tokens: (trained(weights), *inputs(tokens)),
        (3, 0, 1, 9),
        backward=True,
        backend="aot_eager",
        tolerance=1e-4,
        scale=1.0,
    )


class Frozen(nn.Module):
    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        self.config, self.weights = config, weights

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return moe_fn.moe_forward(self.config, self.weights, x, logits)


def test_exported_graphs_give_the_same_numbers() -> None:
    module = Frozen(*layer_of("int4 with zero points"))
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    example = tuple(t.detach() for t in inputs(7))
    program = torch.export.export(module, example, dynamic_shapes=({0: tokens}, {0: tokens}))
    for count in (0, 1, 9):
        args = tuple(t.detach() for t in inputs(count))
        assert_matches(program.module()(*args), module(*args), tolerance=1e-6)


@pytest.mark.thorough
def test_ahead_of_time_packages_give_the_same_numbers(tmp_path: Any) -> None:
    module = Frozen(*layer_of("fp8 blocks"))
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    program = torch.export.export(
        module, tuple(t.detach() for t in inputs(7)), dynamic_shapes=({0: tokens}, {0: tokens})
    )
    run = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    )
    for count in (0, 1, 9):
        args = tuple(t.detach() for t in inputs(count))
        assert_matches(run(*args), module(*args), tolerance=1e-5)


def test_gradients_of_adapters_on_codes_are_those_on_the_floats_that_codes_stand_for() -> None:
    """Gradients pass gradcheck in float64, and outputs are those with dequantized weights."""
    config = dataclasses.replace(
        BASE, hidden_size=4, intermediate_size=4, lora=LoRAConfig(num_adapters=1, rank=2), quant=None
    )
    config = dataclasses.replace(config, quant=QuantConfig(scheme="int4", granularity="group", group_size=2))
    weights = weights_for(config, seed=2, dtype=torch.float64, scales=False)
    assert weights.lora is not None
    lora = {f.name: getattr(weights.lora, f.name).detach().requires_grad_() for f in dataclasses.fields(weights.lora)}
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def layer(x: Tensor, logits: Tensor, *adapters: Tensor) -> Tensor:
        own = dataclasses.replace(weights, lora=moe_fn.LoRAWeights(**dict(zip(lora, adapters, strict=True))))
        return moe_fn.moe_forward(config, own, x, logits)

    assert torch.autograd.gradcheck(layer, (x, logits, *lora.values()))
    plain, floats = moe_fn.dequantize_weights(config, weights, torch.float64)
    assert_matches(layer(x, logits, *lora.values()), moe_fn.moe_forward(plain, floats, x, logits), tolerance=1e-12)


def test_transforms_of_functions_pass_quantized_layers() -> None:
    config, weights = layer_of("fp8 blocks")
    x, logits = (t.detach() for t in inputs(6))

    def loss(x: Tensor, logits: Tensor) -> Tensor:
        return moe_fn.moe_forward(config, weights, x, logits).square().sum()

    both = torch.func.vmap(torch.func.grad(loss))(x.view(2, 3, -1), logits.view(2, 3, -1))
    assert_matches(both.flatten(0, 1), torch.func.grad(loss)(x, logits), tolerance=1e-5)
    _, tangent = torch.func.jvp(loss, (x, logits), (torch.ones_like(x), torch.zeros_like(logits)))
    assert_matches(tangent, torch.func.grad(loss)(x, logits).sum(), tolerance=1e-4, scale=10.0)
