"""Laws of low-rank adapters on experts, and errors for invalid ones."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from support import assert_is_the_layer, flat, gradients, law
from torch import Tensor

import moe_fn
from moe_fn import LoRAConfig, LoRAWeights, MoEConfig, MoEWeights, reference
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, weights_for

LORAS = [
    LoRAConfig(num_adapters=n, rank=r, experts=e)
    for n in (1, 2, 4)
    for r in (1, 3)
    for e in ("each", "shared", "outer_shared")
]
ADAPTED = problems(configs(lora=st.sampled_from(LORAS)))
quick = settings(max_examples=30)


def forward(problem: MoEProblem) -> Tensor:
    y: Tensor = problem.call(moe_fn.moe_forward)
    return y


def lora_of(problem: MoEProblem) -> tuple[LoRAConfig, LoRAWeights]:
    assert problem.config.lora is not None and problem.weights.lora is not None
    return problem.config.lora, problem.weights.lora


def with_lora(problem: MoEProblem, lora: LoRAWeights, ids: Tensor | None) -> MoEProblem:
    return problem.replace(weights=dataclasses.replace(problem.weights, lora=lora), adapter_ids=ids)


def without_lora(problem: MoEProblem) -> MoEProblem:
    config, weights = dataclasses.replace(problem.config, lora=None), dataclasses.replace(problem.weights, lora=None)
    return problem.replace(config=config, weights=weights, adapter_ids=None)


def all_with(problem: MoEProblem, adapter: int) -> MoEProblem:
    return problem.replace(adapter_ids=torch.full(problem.x.shape[:-1], adapter))


def tensors_of(lora: LoRAWeights) -> dict[str, Tensor]:
    return {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora) if getattr(lora, f.name) is not None}


@quick
@law(ADAPTED)
def test_lora_equals_the_reference(problem: MoEProblem) -> None:
    assert_is_the_layer(problem, forward(problem))


@quick
@law(ADAPTED)
def test_gradients_reach_a_and_b(problem: MoEProblem) -> None:
    direction = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    actual, expected = (
        gradients(problem, function, direction) for function in (moe_fn.moe_forward, reference.moe_forward)
    )
    for a, e in zip(actual, expected, strict=True):
        finite = torch.isfinite(e)
        assert_matches(a[finite], e[finite].to(a.dtype), tolerance=1e-5, scale=0.1)


@quick
@law(ADAPTED)
def test_an_adapter_of_zeros_changes_nothing(problem: MoEProblem) -> None:
    lora = lora_of(problem)[1]
    zeros = {name: torch.zeros_like(t) for name, t in tensors_of(lora).items() if name.endswith("b")}
    adapted = with_lora(problem, dataclasses.replace(lora, **zeros), problem.adapter_ids)
    assert_matches(forward(adapted), forward(without_lora(problem)), scale=0.1)


@quick
@law(ADAPTED, st.integers(0, 3))
def test_tokens_without_an_adapter_get_the_layer_without_lora(problem: MoEProblem, seed: int) -> None:
    count = lora_of(problem)[0].num_adapters
    ids = torch.randint(-2, count + 2, problem.x.shape[:-1], generator=torch.Generator().manual_seed(seed))
    adapted = flat(forward(problem.replace(adapter_ids=ids)), 1)
    plain = flat(forward(without_lora(problem)), 1)
    assert adapted is not None and plain is not None
    without_adapter = ((ids < 0) | (ids >= count)).flatten()
    assert_matches(adapted[without_adapter], plain[without_adapter], scale=0.1)


@quick
@law(ADAPTED, st.integers(0, 3))
def test_relabelling_adapters_changes_nothing(problem: MoEProblem, seed: int) -> None:
    config, lora = lora_of(problem)
    order = torch.randperm(config.num_adapters, generator=torch.Generator().manual_seed(seed))
    ids = torch.zeros(problem.x.shape[:-1], dtype=torch.int64) if problem.adapter_ids is None else problem.adapter_ids
    known = (ids >= 0) & (ids < config.num_adapters)
    relabelled = torch.where(known, order.argsort()[ids.clamp(0, config.num_adapters - 1)], ids)
    moved = LoRAWeights(**{name: t[order] for name, t in tensors_of(lora).items()})
    assert_matches(forward(with_lora(problem, moved, relabelled.to(torch.int32))), forward(problem), scale=0.1)


@quick
@law(ADAPTED, st.integers(0, 3))
def test_merged_equals_applied(problem: MoEProblem, number: int) -> None:
    adapter = number % lora_of(problem)[0].num_adapters
    config, weights = moe_fn.merge_lora(problem.config, problem.weights, adapter)
    merged = problem.replace(config=config, weights=weights, adapter_ids=None)
    assert_matches(forward(merged), forward(all_with(problem, adapter)), scale=0.2)


@quick
@law(ADAPTED, st.integers(0, 3))
def test_unmerging_undoes_merging(problem: MoEProblem, number: int) -> None:
    lora_config, lora = lora_of(problem)
    adapter = number % lora_config.num_adapters
    config, weights = moe_fn.unmerge_lora(*moe_fn.merge_lora(problem.config, problem.weights, adapter), lora, adapter)
    assert_matches((weights.gate_up, weights.down), (problem.weights.gate_up, problem.weights.down), scale=0.2)
    assert_matches(forward(problem.replace(config=config, weights=weights)), forward(problem), scale=0.2)


@quick
@law(ADAPTED, st.integers(1, 3))
def test_a_padded_rank_changes_nothing(problem: MoEProblem, more: int) -> None:
    config, lora = lora_of(problem)
    plain, rank = without_lora(problem), config.rank + more
    wide = {
        n: (1, 1, rank, t.shape[3]) if n.endswith("a") else (1, 1, t.shape[2], rank)
        for n, t in tensors_of(lora).items()
    }
    another = LoRAWeights(**{name: torch.ones(shape) for name, shape in wide.items()})
    padded, weights = moe_fn.add_lora(plain.config, plain.weights, [lora, another])
    assert padded.lora is not None and (padded.lora.num_adapters, padded.lora.rank) == (config.num_adapters + 1, rank)
    ids = torch.zeros(problem.x.shape[:-1], dtype=torch.int64) if problem.adapter_ids is None else problem.adapter_ids
    ids = torch.where(ids < config.num_adapters, ids, -1)  # an id that was out of range is now in range
    assert_matches(
        forward(problem.replace(config=padded, weights=weights, adapter_ids=ids)), forward(problem), scale=0.1
    )


CONFIG = MoEConfig(num_experts=3, top_k=2, hidden_size=4, intermediate_size=5, lora=LoRAConfig(num_adapters=2, rank=2))
WEIGHTS = weights_for(CONFIG, dtype=torch.float64)
X, LOGITS = (torch.randn(5, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for n in (4, 3))
IDS = torch.tensor([1, 0, -1, 1, 7])


def of_lora(config: MoEConfig) -> Any:
    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor) -> Tensor:
        lora = LoRAWeights(gate_up_a=a, gate_up_b=b, down_a=c, down_b=d)
        return moe_fn.moe_forward(config, dataclasses.replace(WEIGHTS, lora=lora), x, LOGITS, adapter_ids=IDS)

    return function


def arguments() -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in (*tensors_of(WEIGHTS.lora).values(), X)]  # type: ignore[arg-type]


def test_first_and_second_derivatives_pass_gradcheck() -> None:
    function = of_lora(CONFIG)
    assert torch.autograd.gradcheck(function, arguments(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments(), fast_mode=True)
    args = [t.detach() for t in arguments()]
    tangents = [t.roll(1, 0).cos() for t in args]
    y, pull = torch.func.vjp(function, *args)
    pushed = torch.func.jvp(function, tuple(args), tuple(tangents))[1]
    assert_matches((pushed * y).sum(), sum((g * t).sum() for g, t in zip(pull(y), tangents, strict=True)))


@pytest.mark.parametrize("form", [{}, {"opaque": True}, {"chunk_tokens": 2}], ids=str)
def test_vmap_over_adapters_and_func_grad_are_those_of_a_loop(form: dict[str, Any]) -> None:
    function = of_lora(dataclasses.replace(CONFIG, **form))
    args = [t.detach() for t in arguments()]
    batch = [torch.stack([t, 2 * t, -t]) for t in args]
    batched = torch.func.vmap(function)(*batch)
    assert_matches(batched, torch.stack([function(*(t[i] for t in batch)) for i in range(3)]))

    def loss(*args: Tensor) -> Tensor:
        return function(*args).cos().sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*batch)
    one_by_one = [torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(t[i] for t in batch)) for i in range(3)]
    assert_matches(found, tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True)))


def test_routing_of_the_callers_own_carries_ids() -> None:
    y = moe_fn.moe_forward(CONFIG, WEIGHTS, X, LOGITS, adapter_ids=IDS)
    _, routing = moe_fn.moe_route(CONFIG, WEIGHTS, X, LOGITS, adapter_ids=IDS)
    assert routing.adapter_ids is IDS
    assert torch.equal(moe_fn.moe_forward_routed(CONFIG, WEIGHTS, X, routing), y)
    shared, routed = moe_fn.moe_forward_shared(CONFIG, WEIGHTS, X, LOGITS, adapter_ids=IDS)
    assert torch.equal(shared + routed, y)
    assert torch.equal(moe_fn.moe_forward_with_stats(CONFIG, WEIGHTS, X, LOGITS, adapter_ids=IDS)[0], y)


def test_bfloat16_rounds_as_the_table_says() -> None:
    config = MoEConfig(
        num_experts=4, top_k=2, hidden_size=256, intermediate_size=128, lora=LoRAConfig(num_adapters=2, rank=8)
    )
    weights = weights_for(config, seed=1, dtype=torch.bfloat16)
    x, logits = (torch.randn(24, n, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16) for n in (256, 4))
    ids = torch.arange(24) % 3 - 1
    actual = moe_fn.moe_forward(config, weights, x, logits, adapter_ids=ids)
    assert_matches(actual, reference.moe_forward(config, weights, x, logits, adapter_ids=ids))


def test_autocast_reaches_the_adapters() -> None:
    weights = weights_for(CONFIG)
    x, logits = X.float(), LOGITS.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_fn.moe_forward(CONFIG, weights, x, logits, adapter_ids=IDS)
    assert_matches(y.to(torch.bfloat16), reference.moe_forward(CONFIG, weights, x, logits, adapter_ids=IDS), scale=1.0)


def call(config: MoEConfig = CONFIG, weights: MoEWeights = WEIGHTS, ids: Any = IDS) -> Tensor:
    return moe_fn.moe_forward(config, weights, X, LOGITS, adapter_ids=ids)


def lora_with(**changes: Any) -> MoEWeights:
    return dataclasses.replace(WEIGHTS, lora=dataclasses.replace(lora_weights(), **changes))


def lora_weights() -> LoRAWeights:
    assert WEIGHTS.lora is not None
    return WEIGHTS.lora


MATRICES = torch.ones(3, 2, 5), torch.ones(3, 4, 2)
WRONG: dict[str, Any] = {
    "adapter_ids is None; expected an id of the 2 adapters": lambda: call(ids=None),
    "adapter_ids is torch.float64": lambda: call(ids=X[:, 0]),
    "adapter_ids is \\(5, 1\\)": lambda: call(ids=IDS.unsqueeze(1)),
    "adapter_ids is a list": lambda: call(ids=[0] * 5),
    "adapter_ids would have no effect": lambda: call(
        dataclasses.replace(CONFIG, lora=None), dataclasses.replace(WEIGHTS, lora=None)
    ),
    "weights.lora.gate_up_a is .*; expected None, because the config": lambda: call(
        dataclasses.replace(CONFIG, lora=None), ids=None
    ),
    "weights.lora is None": lambda: call(weights=dataclasses.replace(WEIGHTS, lora=None)),
    "weights.lora has no tensors": lambda: call(weights=dataclasses.replace(WEIGHTS, lora=LoRAWeights())),
    "one of weights.lora.down_a and weights.lora.down_b is None": lambda: call(weights=lora_with(down_b=None)),
    "weights.lora.down_a is \\(2, 3, 2, 4\\)": lambda: call(weights=lora_with(down_a=torch.zeros(2, 3, 2, 4))),
    "weights.lora.down_a is torch.float32; expected the dtype of x": lambda: call(
        weights=lora_with(down_a=torch.zeros(2, 3, 2, 5))
    ),
    "LoRAConfig.rank is 0": lambda: LoRAConfig(rank=0),
    "LoRAConfig.experts is 'some'": lambda: LoRAConfig(experts="some"),  # type: ignore[arg-type]
    "MoEConfig.lora is 3": lambda: dataclasses.replace(CONFIG, lora=3),
    "merge_lora: the layer has no adapters": lambda: moe_fn.merge_lora(dataclasses.replace(CONFIG, lora=None), WEIGHTS),
    "merge_lora: adapter is 2": lambda: moe_fn.merge_lora(CONFIG, WEIGHTS, 2),
    "weights.down is torch.int8, quantized": lambda: moe_fn.merge_lora(
        CONFIG, dataclasses.replace(WEIGHTS, down=WEIGHTS.down.to(torch.int8))
    ),
    "make_lora: gate_up and down are None": lambda: moe_fn.make_lora(alpha=1.0),
    "make_lora: down is \\[3, 2, 5\\] and \\[3, 2, 5\\]": lambda: moe_fn.make_lora(
        down=(MATRICES[0], MATRICES[0]), alpha=1.0
    ),
    "make_lora: alpha is nan": lambda: moe_fn.make_lora(down=MATRICES, alpha=float("nan")),
    "add_lora: the layer has adapters": lambda: moe_fn.add_lora(CONFIG, WEIGHTS, [lora_weights()]),
    "add_lora: adapters is empty": lambda: moe_fn.add_lora(
        dataclasses.replace(CONFIG, lora=None), dataclasses.replace(WEIGHTS, lora=None), []
    ),
    "add_lora: weights.lora.gate_up_b is": lambda: moe_fn.add_lora(
        dataclasses.replace(CONFIG, lora=None, intermediate_size=6),
        weights_for(dataclasses.replace(CONFIG, lora=None, intermediate_size=6)),
        [lora_weights()],
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_is_said_in_words(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WRONG[words]()


def test_a_config_with_lora_survives_json() -> None:
    assert MoEConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    for stabilised, factor in ((False, 3.0), (True, 6.0 / 2**0.5)):
        lora = moe_fn.make_lora(down=MATRICES, alpha=6.0, rank_stabilised=stabilised)
        assert lora.down_b is not None and torch.allclose(lora.down_b, torch.full((1, 3, 4, 2), factor))
