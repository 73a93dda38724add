"""Tracers other than torch.compile: each traces the layer, or raises an error of docs/errors.md that names
one that does.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import draft_export
from torch.fx import wrap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import moe_fn
from compile_tests.cases import Case, as_leaves, cases
from compile_tests.test_transforms import Layer
from moe_fn import moe_forward
from moe_fn.backends import backend_of

wrap("moe_forward")
BOTH = ("default", "everything")


@cases(("default", "everything"), ("opaque", "opaque_chunked"))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_an_opaque_layer_serves_every_number_of_tokens(case: Case) -> None:
    weights = case.weights()
    given = [i for i, t in enumerate(case.token_args(5)) if t is not None]

    def layer(*tensors: Tensor) -> Tensor:
        args: list[Any] = [None, None, None]
        for i, t in zip(given, tensors, strict=True):
            args[i] = t
        return case.layer(weights, *args)

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return tuple(case.token_args(tokens)[i] for i in given)

    traced = torch.jit.trace(layer, inputs(5))
    assert sum(node.kind() == "moe_fn::moe_forward" for node in traced.graph.nodes()) == 1
    for tokens in (0, 1, 5, 40):
        assert torch.equal(traced(*inputs(tokens)), layer(*inputs(tokens)))


@pytest.mark.parametrize("recipe", BOTH)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_draft_export_takes_the_torch_back_end(recipe: str) -> None:
    case = Case(recipe, backend="torch")
    module, args = Layer(case.config, case.weights()), case.token_args(5)
    torch.testing.assert_close(draft_export(module, args).module()(*args), module(*args))


@pytest.mark.parametrize("case", [Case("default"), Case("default", "opaque")], ids=str)
def test_draft_export_of_ops_with_optional_tensors_says_what_to_use(case: Case) -> None:
    if case.form == "plain" and backend_of(case.config, torch.ones(1)) == "torch":
        pytest.skip("no kernels here")
    module, args = Layer(case.config, case.weights()), case.token_args(5)
    with pytest.raises(ValueError, match=r"draft_export .* expected torch\.export\.export"):
        draft_export(module, args)


def test_a_wrapped_layer_is_one_node_of_symbolic_trace() -> None:
    case = Case("gpt_oss")
    weights, x, *_ = case.args(5)
    traced = torch.fx.symbolic_trace(lambda x: moe_forward(case.config, weights, x))
    assert [node.target for node in traced.graph.nodes if node.target is moe_fn.moe_forward] == [moe_fn.moe_forward]
    assert torch.equal(traced(x), case.layer(weights, x))


@cases(BOTH)
def test_make_fx_traces_forward_and_gradient(case: Case) -> None:
    weights, x, *rest = case.args(5)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(case.layer(weights, x, *rest).square().sum(), x)[0]

    for function in (lambda x: case.layer(weights, x, *rest), gradient):
        torch.testing.assert_close(make_fx(function)(x)(x), function(x), rtol=1e-5, atol=1e-6)


@cases(("default",), ("plain", "chunked", "opaque"))
def test_a_gradient_inside_a_compiled_function_is_that_of_eager(case: Case) -> None:
    weights, x, logits, _ = as_leaves(case.args(5))

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(case.layer(weights, x, logits).square().sum(), x)[0]

    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x), rtol=1e-5, atol=1e-6)


def test_parametrized_weights_are_seen_and_trained() -> None:
    case = Case("default")
    module, args = Layer(case.config, case.weights()), case.token_args(5)
    expected = Layer(case.config, case.weights())
    with torch.no_grad():
        expected.leaves[0].mul_(2)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module.leaves, "0", Double())
    assert torch.equal(module(*args), expected(*args))
    module(*args).square().sum().backward()
    expected(*args).square().sum().backward()
    torch.testing.assert_close(module.leaves.parametrizations["0"].original.grad, 2 * expected.leaves[0].grad)
