"""Invalid calls raise the package's messages: ValueError in eager mode and plain compile; with fullgraph torch wraps
them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fn
from compile_tests.cases import FORMS, HIDDEN, Case
from moe_fn import MoEWeights


@dataclass(frozen=True)
class Wrong:
    """A change that makes a call invalid, and text that the error must contain."""

    spoil: Callable[..., tuple[Any, ...]]
    words: str


def _weights(**changes: Any) -> Callable[..., tuple[Any, ...]]:
    return lambda weights, x, logits: (replace(weights, **changes), x, logits)


WRONG = {
    "narrow x": Wrong(lambda w, x, z: (w, x[:, 1:], z), "x is"),
    "flat x": Wrong(lambda w, x, z: (w, x[0], z), "x is"),
    "integer x": Wrong(lambda w, x, z: (w, x.to(torch.int64), z), "expected a floating-point dtype"),
    "too few logits": Wrong(lambda w, x, z: (w, x, z[:, 1:]), "num_logits=8"),
    "boolean logits": Wrong(lambda w, x, z: (w, x, z > 0), "expected a floating-point dtype"),
    "other dtype": Wrong(lambda w, x, z: (w, x.to(torch.bfloat16), z), "expected the dtype of x, torch.bfloat16"),
    "no logits and no gate": Wrong(
        lambda w, x, z: (replace(w, router=None), x, None), "logits and weights.router.gate are None"
    ),
    "gate_up of another size": Wrong(
        lambda w, x, z: (replace(w, gate_up=w.gate_up[:, 1:]), x, z), "weights.gate_up is (8, 23, 16)"
    ),
    "weights without use": Wrong(_weights(constants=torch.zeros(2, HIDDEN)), "weights.constants is"),
}


def call(form: str) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    config = Case("default", form).config

    def layer(weights: MoEWeights, x: Tensor, logits: Tensor | None) -> Tensor:
        return moe_fn.moe_forward(config, weights, x, logits)

    return layer, Case("default").args(9)[:3]


# Every invalid call in stages, and one in each form: the check runs before the forms differ.
WRONG_IN_FORMS = [
    pytest.param(name, form, marks=[pytest.mark.thorough] * (form != "plain" and name != "narrow x"))
    for form in FORMS
    for name in WRONG
]
wrong_calls = pytest.mark.parametrize(("name", "form"), WRONG_IN_FORMS)


@wrong_calls
def test_eager_and_plain_compile_raise_value_errors_that_say_what_is_wrong(name: str, form: str) -> None:
    layer, args = call(form)
    spoilt = WRONG[name].spoil(*args)
    for fn in (layer, torch.compile(layer, backend="eager")):
        with pytest.raises(ValueError) as raised:
            fn(*spoilt)
        assert WRONG[name].words in str(raised.value)
        assert str(raised.value).startswith("moe_forward: ")


@wrong_calls
def test_under_fullgraph_the_error_contains_our_words(name: str, form: str) -> None:
    layer, args = call(form)
    with pytest.raises(Exception) as raised:
        torch.compile(layer, backend="eager", fullgraph=True)(*WRONG[name].spoil(*args))
    assert WRONG[name].words in str(raised.value)


@pytest.mark.parametrize(
    "form", ["plain", *(pytest.param(form, marks=pytest.mark.thorough) for form in FORMS if form != "plain")]
)
@pytest.mark.parametrize("argument", ["logits", "token_mask"])
def test_another_number_of_tokens_is_refused_with_our_words(argument: str, form: str) -> None:
    layer, (weights, x, logits) = call(form)
    config = Case("default", form).config

    def masked(weights: MoEWeights, x: Tensor, mask: Tensor) -> Tensor:
        return moe_fn.moe_forward(config, weights, x, torch.ones_like(x[:, :8]), token_mask=mask)

    fn, args = (
        (layer, (weights, x, logits[1:]))
        if argument == "logits"
        else (masked, (weights, x, torch.ones(8, dtype=torch.bool)))
    )
    with pytest.raises(ValueError, match=rf"moe_forward: {argument} is .*expected the leading dims of x, \(9, 16\)"):
        fn(*args)
    for fullgraph in (False, True):
        with pytest.raises(Exception, match=r"differ in their number of tokens|expected the leading dims of x"):
            torch.compile(fn, backend="aot_eager", fullgraph=fullgraph)(*args)
        torch._dynamo.reset()


@pytest.mark.parametrize("form", FORMS)
def test_a_marked_mismatch_is_an_error_never_a_result(form: str) -> None:
    """Both counts are unbacked then: torch may raise its own error, or raise when the graph runs."""
    layer, (weights, x, logits) = call(form)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    moe_fn.mark_tokens(x, logits)
    compiled(weights, x, logits)
    fewer = logits[1:].clone()
    moe_fn.mark_tokens(fewer)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        compiled(weights, x, fewer)


@pytest.mark.parametrize("form", FORMS)
def test_a_right_call_after_a_wrong_one_works(form: str) -> None:
    layer, args = call(form)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(ValueError, match="x is"):
        compiled(*WRONG["narrow x"].spoil(*args))
    assert torch.equal(compiled(*args), layer(*args))


def test_marking_what_cannot_be_marked_is_refused() -> None:
    with pytest.raises(ValueError, match="mark_tokens: expected tensors"):
        moe_fn.mark_tokens(torch.zeros(()))
    with pytest.raises(ValueError, match="mark_tokens: expected tensors"):
        moe_fn.mark_tokens([torch.zeros(3)])  # type: ignore[arg-type]
