"""Invalid calls raise a ValueError that names the argument, its value and what was expected: docs/errors.md."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tools.error_page import PAGE, names_of, raised_by, rows_of

import moe_fn
from moe_fn import GroupConfig, MoEConfig, RouterConfig, Routing, SharedExpertsConfig, checkpoint
from moe_fn.testing import weights_for

BASE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 6, "intermediate_size": 5}
CONFIG = MoEConfig(**BASE)
WEIGHTS = weights_for(CONFIG)
X, LOGITS = torch.randn(3, 6), torch.randn(3, 4)
PAGE_TEXT = PAGE.read_text() if PAGE.exists() else "```python\n```"
NAMES = names_of(PAGE_TEXT)
ROWS = dict(rows_of(PAGE_TEXT))


@pytest.mark.skipif(not PAGE.exists(), reason="installed without the repository")
@pytest.mark.parametrize("wrong", ROWS)
def test_a_wrong_call_raises_the_words_of_the_page(wrong: str) -> None:
    """Each row of the tables in docs/errors.md raises its message."""
    assert raised_by(wrong, NAMES) == ROWS[wrong]
    assert "expected" in ROWS[wrong]


# Records are not checked when constructed, but where they are used; the others take no argument, are the reference, or
# need ranks.
UNCHECKED = {
    "BackendInfo", "Calibration", "Dispatched", "Entry", "LAYOUTS", "LatentWeights", "Layout", "LoRAWeights",
    "LoadWindow", "Message",
    "MoELayer", "MoEWeights", "Move", "Moves", "Placement", "Routing", "RoutingStats", "Traffic", "backends", "balance",
    "balanced_senders",
    "balancedness", "move_experts", "reference", "sends_per_gpu", "start_moving", "stats_of_routing", "total",
}  # fmt: skip


@pytest.mark.skipif(not PAGE.exists(), reason="installed without the repository")
@pytest.mark.parametrize(
    "module", [moe_fn, moe_fn.parallel, moe_fn.balance, checkpoint], ids=lambda module: module.__name__
)
def test_every_public_name_is_called_wrongly_on_the_page(module: Any) -> None:
    calls = "\n".join(ROWS)
    assert [name for name in module.__all__ if name not in UNCHECKED and not re.search(rf"\b{name}\(", calls)] == []


def call(**changes: Any) -> Callable[[], Any]:
    """moe_forward with some arguments replaced."""
    args: dict[str, Any] = {"config": CONFIG, "weights": WEIGHTS, "x": X, "logits": LOGITS} | changes
    return lambda: moe_fn.moe_forward(**args)


def routed(ids: Any, w: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: moe_fn.moe_forward_routed(CONFIG, WEIGHTS, X, Routing(expert_ids=ids, weights=w, **changes))


HASH = MoEConfig(**BASE, router=RouterConfig(selection="hash"))
ONES = torch.ones(3, 2)


def test_an_id_outside_the_hash_table_is_an_error_and_no_wrong_answer() -> None:
    with pytest.raises((ValueError, IndexError)):
        call(config=HASH, weights=weights_for(HASH), token_ids=torch.tensor([0, 1, 99]))()


def test_ids_past_the_experts_are_nobodys_and_crash_nothing() -> None:
    y = routed(torch.tensor([[0, 99], [-7, 3], [4, 5]]), ONES)()
    assert torch.isfinite(y).all()
    assert (y[2] == 0).all()


def test_unusual_strides_give_the_same_numbers() -> None:
    expected = call()()
    strided = call(x=X.t().contiguous().t(), logits=torch.stack([LOGITS, LOGITS], -1)[..., 0])()
    assert torch.allclose(strided, expected, atol=1e-6)
    expanded = dataclasses.replace(WEIGHTS, gate_up=WEIGHTS.gate_up[:1].expand(4, -1, -1), gate_up_bias=None)
    assert torch.isfinite(call(weights=expanded)()).all()


def test_a_config_survives_json_and_equal_configs_hash_alike() -> None:
    rich = MoEConfig(
        **BASE,
        shared=SharedExpertsConfig(intermediate_size=2),
        router=RouterConfig(groups=GroupConfig(count=2, top_k=1)),
    )
    again = MoEConfig.from_dict(json.loads(json.dumps(rich.to_dict())))
    assert again == rich and hash(again) == hash(rich)


def test_zero_tokens_work_everywhere() -> None:
    for leading in ((0,), (0, 3), (2, 0)):
        x = torch.zeros(*leading, 6, requires_grad=True)
        y, stats = moe_fn.moe_forward_with_stats(CONFIG, WEIGHTS, x, torch.zeros(*leading, 4))
        assert y.shape == x.shape
        (y.sum() + stats.load_balancing_loss).backward()
        assert x.grad is not None and stats.expert_load.sum() == 0
