"""Every way to call wrongly that we could think of is a ValueError that says where, what came and what was expected."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moe_fn
from moe_fn import (
    ActivationConfig,
    ExpertNormConfig,
    GroupConfig,
    LatentConfig,
    MoEConfig,
    NormsConfig,
    RouterConfig,
    RouterWeights,
    Routing,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.testing import weights_for

BASE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 6, "intermediate_size": 5}
CONFIG = MoEConfig(**BASE)
WEIGHTS = weights_for(CONFIG)
X, LOGITS = torch.randn(3, 6), torch.randn(3, 4)


def config(**changes: Any) -> Callable[[], Any]:
    return lambda: MoEConfig(**(BASE | changes))


def router(**changes: Any) -> Callable[[], Any]:
    return lambda: RouterConfig(**changes)


BAD_CONFIGS = {
    "num_experts is 0": config(num_experts=0),
    "top_k is -1": config(top_k=-1),
    "top_k is True": config(top_k=True),
    "hidden_size is 6.0": config(hidden_size=6.0),
    "intermediate_size is '5'": config(intermediate_size="5"),
    "top_k=5; expected at most the 4 experts": config(top_k=5),
    "chunk_tokens is 0": config(chunk_tokens=0),
    "hidden_padding is -1": config(hidden_padding=-1),
    "backend is 'cuda'": config(backend="cuda"),
    "gate_up_layout is 'halves'": config(gate_up_layout="halves"),
    "weight_layout is 'oi'": config(weight_layout="oi"),
    "opaque is 1": config(opaque=1),
    "batch_invariant=True": config(batch_invariant=True),
    "router is None": config(router=None),
    "shared is 3": config(shared=3),
    "activation is 'swish'": config(activation="swish"),
    "gate_up_layout='interleaved' would have no effect": config(activation="relu2_no_mul", gate_up_layout="interleaved"),
    "4 experts do not split into 3 equal groups": config(router=RouterConfig(groups=GroupConfig(count=3, top_k=1))),
    "equal groups with a top2_sum": config(router=RouterConfig(scoring="sigmoid", groups=GroupConfig(count=4, top_k=2, score="top2_sum"))),
    "at most the 1 experts of 1 groups": config(router=RouterConfig(groups=GroupConfig(count=4, top_k=1))),
    "expected a multiple of groups.count=4": config(router=RouterConfig(groups=GroupConfig(count=4, top_k=4, limit="each"))),
    "capacity is 0": router(capacity=0),
    "NormsConfig would have no effect": lambda: NormsConfig(),
    "norms.gate=True with router.gate_input='transformed'": config(
        norms=NormsConfig(gate=True), hidden_padding=1, router=RouterConfig(gate_input="transformed")
    ),
    "'sparsemixer': expected 2": config(top_k=3, router=RouterConfig(selection="sparsemixer", renormalize=False)),
    "zero_experts: expected router.scale_on='weights'": config(
        zero_experts=ZeroExpertsConfig(count=1), router=RouterConfig(scale_on="output", routed_scaling_factor=2.0)
    ),
    "a score of one logit alone": config(shared=SharedExpertsConfig(intermediate_size=2, gate="router")),
    "gate_input='transformed' would have no effect": config(router=RouterConfig(gate_input="transformed")),
    "GroupConfig or None": router(groups=5),
    "routed_scaling_factor is 1000.*expected a finite number": router(routed_scaling_factor=10**400),
    "num_experts is 9223372036854775808; expected an int >= 1, below 2.63": config(num_experts=2**63),
    r"unknown names \[1, 'experts'\]": lambda: MoEConfig.from_dict(BASE | {1: 2, "experts": 3}),  # type: ignore[dict-item]
    "scoring is 'tanh'": router(scoring="tanh"),
    "selection is 'random'": router(selection="random"),
    "routed_scaling_factor is nan": router(routed_scaling_factor=float("nan")),
    "routed_scaling_factor=0.0": router(routed_scaling_factor=0.0, scale_on="output"),
    "logit_softcap is 0.0": router(logit_softcap=0.0),
    "renormalize_epsilon is -1.0": router(renormalize_epsilon=-1.0),
    "renormalize_epsilon=1e-20 would have no effect": router(renormalize=False, renormalize_epsilon=1e-20),
    "sparsemixer_epsilon=0.1 would have no effect": router(sparsemixer_epsilon=0.1),
    "correction_bias='scores' would have no effect": router(selection="hash", correction_bias="scores"),
    "scoring='sigmoid' would have no effect": router(selection="sparsemixer", renormalize=False, scoring="sigmoid"),
    "its two weights come from two softmaxes": router(selection="sparsemixer"),
    "groups are ranked by scores": router(groups=GroupConfig(count=2, top_k=1), scoring_order="after_top_k"),
    "GroupConfig.top_k is 3": lambda: GroupConfig(count=2, top_k=3),
    "every group is kept": lambda: GroupConfig(count=4, top_k=2, limit="each"),
    "ActivationConfig.limit is -1.0": lambda: ActivationConfig(limit=-1.0),
    "limit_at='output' would have no effect": lambda: ActivationConfig(limit_at="output"),
    "alpha=2.0 would have no effect": lambda: ActivationConfig(function="gelu", alpha=2.0),
    "gate_cap=None with function='situ'": lambda: ActivationConfig(function="situ"),
    "belong to gated activations": lambda: ActivationConfig(gated=False, limit=1.0),
    "SharedExpertsConfig.gate is 'soft'": lambda: SharedExpertsConfig(intermediate_size=1, gate="soft"),  # type: ignore[arg-type]
    "ZeroExpertsConfig.kind is 'copy'": lambda: ZeroExpertsConfig(count=1, kind="copy"),  # type: ignore[arg-type]
    "LatentConfig.size is 0": lambda: LatentConfig(size=0),
    "ExpertNormConfig.epsilon is inf": lambda: ExpertNormConfig(epsilon=float("inf")),
    r"unknown names \['experts'\]": lambda: MoEConfig.from_dict(BASE | {"experts": 3}),
    r"\['top_k'\] missing": lambda: MoEConfig.from_dict({k: v for k, v in BASE.items() if k != "top_k"}),
    "expected a dict": lambda: MoEConfig.from_dict([1]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("words", BAD_CONFIGS)
def test_a_bad_config_says_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BAD_CONFIGS[words]()


def call(**changes: Any) -> Callable[[], Any]:
    """moe_forward with some arguments replaced."""
    args: dict[str, Any] = {"config": CONFIG, "weights": WEIGHTS, "x": X, "logits": LOGITS} | changes
    return lambda: moe_fn.moe_forward(**args)


def weights(**changes: Any) -> Callable[[], Any]:
    return call(weights=dataclasses.replace(WEIGHTS, **changes))


def router_weights(**changes: Any) -> Callable[[], Any]:
    return weights(router=RouterWeights(**changes))


def routed(ids: Any, w: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: moe_fn.moe_forward_routed(CONFIG, WEIGHTS, X, Routing(expert_ids=ids, weights=w, **changes))


HASH = MoEConfig(**BASE, router=RouterConfig(selection="hash"))
BIASED = MoEConfig(**BASE, router=RouterConfig(correction_bias="scores"))
IDS, ONES = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
BAD_CALLS = {
    r"moe_forward: x is \(3, 7\); expected \(..., hidden_size\) with hidden_size=6": call(x=torch.randn(3, 7)),
    r"x is \(6\)": call(x=torch.randn(6)),
    "x is torch.int64": call(x=torch.zeros(3, 6, dtype=torch.int64)),
    "x is a list": call(x=[1.0]),
    "config is a dict": call(config=BASE),
    "weights is a tuple": call(weights=()),
    r"logits is \(3, 5\); expected \(..., num_logits\) with num_logits=4": call(logits=torch.randn(3, 5)),
    r"logits is \(2, 4\); expected the leading dims of x": call(logits=torch.randn(2, 4)),
    r"logits is \(1, 3, 4\)": call(logits=torch.randn(1, 3, 4)),
    "logits is torch.int64; expected a floating-point dtype": call(logits=torch.zeros(3, 4, dtype=torch.int64)),
    "logits is on meta": call(logits=LOGITS.to("meta")),
    "logits is None and weights.router.gate too": call(logits=None, weights=dataclasses.replace(WEIGHTS, router=None)),
    "token_mask is torch.float32; expected bool": call(token_mask=torch.ones(3)),
    r"token_mask is \(2\)": call(token_mask=torch.ones(2, dtype=torch.bool)),
    r"token_mask is \(3, 1\)": call(token_mask=torch.ones(3, 1, dtype=torch.bool)),
    "token_ids would have no effect": call(token_ids=torch.zeros(3, dtype=torch.int64)),
    "token_ids is None; expected integer ids": call(config=HASH, weights=weights_for(HASH)),
    "token_ids is torch.float32; expected an integer dtype": call(config=HASH, weights=weights_for(HASH), token_ids=torch.zeros(3)),
    r"weights.gate_up is \(4, 6, 10\); expected \(num_experts, 2 \* intermediate_size, expert_hidden_size\) = \(4, 10, 6\)": weights(
        gate_up=WEIGHTS.gate_up.transpose(1, 2)
    ),
    r"weights.down is \(3, 6, 5\)": weights(down=WEIGHTS.down[:3]),
    "weights.down is torch.float64; expected the dtype of x": weights(down=WEIGHTS.down.double()),
    "weights.down is on meta": weights(down=WEIGHTS.down.to("meta")),
    r"weights.gate_up_bias is \(10\)": weights(gate_up_bias=torch.zeros(10)),
    "weights.down_bias is torch.int32": weights(down_bias=torch.zeros(4, 6, dtype=torch.int32)),
    r"weights.expert_norm is \(4, 6\); expected None, for the config has no use for it": weights(expert_norm=torch.ones(4, 6)),
    "weights.constants is .*; expected None": weights(constants=torch.ones(1, 6)),
    "weights.router.correction_bias is .*; expected None": router_weights(correction_bias=torch.zeros(4)),
    "weights.router.expert_ids_of_token is .*; expected None": router_weights(expert_ids_of_token=torch.zeros(9, 2, dtype=torch.int64)),
    r"weights.router.correction_bias is None; expected \(num_choices\) = \(4\)": call(config=BIASED),
    r"weights.router.expert_scale is \(5\)": router_weights(expert_scale=torch.ones(5)),
    "weights.router.bias without weights.router.gate": router_weights(bias=torch.zeros(4)),
    "weights.shared.gate_up is None": call(config=dataclasses.replace(CONFIG, shared=SharedExpertsConfig(intermediate_size=3))),
    "weights.latent.input is None": call(config=dataclasses.replace(CONFIG, latent=LatentConfig(size=6))),
    "weights.expert_norm is None": call(config=dataclasses.replace(CONFIG, expert_norm=ExpertNormConfig())),
    r"routing.expert_ids is \(3, 1\)": routed(IDS[:, :1], ONES),
    "routing.expert_ids is torch.float32": routed(IDS.float(), ONES),
    r"routing.weights is \(2, 2\)": routed(IDS, ONES[:2]),
    "routing.weights is torch.int64": routed(IDS, ONES.long()),
    "routing.shared_weights is given; expected the opposite": routed(IDS, ONES, shared_weights=torch.ones(3, 1)),
    r"route: logits is \(1, 3, 4\)": lambda: moe_fn.route(CONFIG, WEIGHTS, LOGITS[None]),
    "reduce_and_trunc: y has 4 columns; expected at least width=5": lambda: moe_fn.reduce_and_trunc(LOGITS, width=5),
    "mark_tokens": lambda: moe_fn.mark_tokens(torch.tensor(1.0)),
}


@pytest.mark.parametrize("words", BAD_CALLS)
def test_a_bad_call_says_where_and_what_was_expected(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BAD_CALLS[words]()


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
    rich = MoEConfig(**BASE, shared=SharedExpertsConfig(intermediate_size=2), router=RouterConfig(groups=GroupConfig(count=2, top_k=1)))
    again = MoEConfig.from_dict(json.loads(json.dumps(rich.to_dict())))
    assert again == rich and hash(again) == hash(rich)


def test_zero_tokens_work_everywhere() -> None:
    for leading in ((0,), (0, 3), (2, 0)):
        x = torch.zeros(*leading, 6, requires_grad=True)
        y, stats = moe_fn.moe_forward_with_stats(CONFIG, WEIGHTS, x, torch.zeros(*leading, 4))
        assert y.shape == x.shape
        (y.sum() + stats.load_balancing_loss).backward()
        assert x.grad is not None and stats.expert_load.sum() == 0
