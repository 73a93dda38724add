"""batch_invariant=True, compiled: one node, bitwise equal to eager for every number of tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_fn
from compile_tests.cases import Case, as_leaves, cases
from compile_tests.graphs import graphs_of, ops
from compile_tests.test_same_numbers import run
from moe_fn import MoEConfig
from moe_fn.testing import assert_matches

RECIPES = ("default", "deepseek", "gpt_oss", "everything")


def layer_of(case: Case) -> tuple[MoEConfig, Any]:
    config = replace(case.config, batch_invariant=True)
    return config, lambda weights, x, logits=None, mask=None: moe_fn.moe_forward(
        config, weights, x, logits, token_mask=mask
    )


@cases(RECIPES, ("plain",))
def test_compiled_has_the_bits_of_eager(case: Case) -> None:
    _, layer = layer_of(case)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (20, 7, 1, 0):
        args = case.args(tokens, torch.bfloat16)
        moe_fn.mark_tokens(*args[1:])
        found, expected = run(compiled, args), run(layer, args)
        assert_matches(found, expected, tolerance=0.0)


@pytest.mark.parametrize("entry", [moe_fn.moe_forward, moe_fn.moe_forward_shared], ids=lambda entry: entry.__name__)
def test_the_layer_is_one_node(entry: Any) -> None:
    case = Case("everything")
    config, _ = layer_of(case)
    graphs = graphs_of(lambda *args: entry(config, *args[:3], token_mask=args[3]), as_leaves(case.args(9)))
    assert ops(graphs.forward) == {entry.__name__: 1}
    assert ops(graphs.backward) == {"moe_backward": 1}
