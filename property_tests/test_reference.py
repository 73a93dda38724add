"""The reference, compared with golden values and with cases computed by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fn import reference
from moe_fn.config import (
    ActivationConfig,
    ExpertNormConfig,
    GroupConfig,
    LatentConfig,
    MoEConfig,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
    as_activation,
)
from moe_fn.records import (
    LatentWeights,
    MoEWeights,
    RouterWeights,
    Routing,
    SharedWeights,
    leaves_of_weights,
    weights_of_leaves,
)

NAN, INF = math.nan, math.inf
Z8 = [1.0, -1.0, 0.5, 2.0, -0.5, 0.0, 3.0, -2.0]
B8 = [0.0, 0.9, 0.0, 0.0, 0.8, 0.7, -0.9, 0.0]


def t64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Any, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(
        actual.detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def config_of(num_experts: int, top_k: int, hidden: int = 1, intermediate: int = 1, **options: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts, top_k=top_k, hidden_size=hidden, intermediate_size=intermediate, **options
    )


def scaling_weights(scales: list[float], hidden: int = 1, **more: Any) -> MoEWeights:
    """Returns weights of experts without gates: expert e of activation "relu_no_mul" maps x >= 0 to scales[e] * x."""
    eye = torch.eye(hidden, dtype=torch.float64)
    return MoEWeights(gate_up=torch.stack([eye for _ in scales]), down=torch.stack([s * eye for s in scales]), **more)


def route_once(
    logits: list[float], top_k: int, router: RouterConfig, dtype: torch.dtype = torch.float32, **more: Any
) -> Routing:
    weights = scaling_weights([1.0] * len(logits), router=RouterWeights(**more) if more else None)
    return reference.route(config_of(len(logits), top_k, router=router), weights, torch.tensor([logits], dtype=dtype))


# --- activations ------------------------------------------------------------------------------------------------------

GATE, UP = t64(2.0, -1.0, 9.0), t64(-3.0, 0.5, -8.0)
SWIGLUOAI = ActivationConfig(limit=7.0, alpha=1.702, up_offset=1.0)
GATED = [
    ("silu", [-5.284782, -0.134471, -71.991119]),
    (ActivationConfig(limit=7.0), [-5.284782, -0.134471, -48.955360]),
    ("gelu", [-5.863499, -0.079328, -72.0]),
    ("gelu_tanh", [-5.863793, -0.079404, -72.0]),
    ("swigluoai", [-3.871317, -0.231306, -41.999718]),
    (SWIGLUOAI, [-3.871317, -0.231306, -41.999718]),
    ("swiglustep", [-5.284782, -0.134471, -49.0]),
    (ActivationConfig(function="situ", gate_cap=4.0), [-4.884377, -0.131738, -31.292973]),
    (ActivationConfig(function="situ", gate_cap=4.0, up_cap=2.0), [-2.947390, -0.129060, -7.817997]),
    ("relu", [-6.0, 0.0, -72.0]),
    ("relu2", [-12.0, 0.0, -648.0]),
]
NOT_GATED = [
    ("silu_no_mul", [1.761594, -0.268941, 8.998889]),
    ("gelu_no_mul", [1.954500, -0.158655, 9.0]),
    ("gelu_tanh_no_mul", [1.954598, -0.158808, 9.0]),
    ("relu_no_mul", [2.0, 0.0, 9.0]),
    ("relu2_no_mul", [4.0, 0.0, 81.0]),
]


def layer_that_is_its_activation(activation: Any, layout: str, weight_layout: str) -> Tensor:
    """Returns a layer of one expert with weight 1: gate_up copies the input [gates, ups] to its places in the
    layout, and down is a slice.
    """
    gated = as_activation(activation).gated
    x = torch.cat([GATE, UP]) if gated else GATE
    gate_up = torch.eye(len(x), dtype=torch.float64)
    if layout == "interleaved":
        gate_up = gate_up[[0, 3, 1, 4, 2, 5]]
    down = torch.eye(len(x), 3, dtype=torch.float64)
    if weight_layout == "in_out":
        gate_up, down = gate_up.T, down.T
    config = config_of(1, 1, len(x), 3, activation=activation, gate_up_layout=layout, weight_layout=weight_layout)
    weights = MoEWeights(gate_up=gate_up[None], down=down[None])
    return reference.moe_forward(config, weights, x[None], t64([0.0]))[0, :3]


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("layout", ["packed", "interleaved"])
@pytest.mark.parametrize(("activation", "expected"), GATED, ids=str)
def test_gated_activations_are_the_golden_ones(
    activation: Any, expected: list[float], layout: str, weight_layout: str
) -> None:
    close(layer_that_is_its_activation(activation, layout, weight_layout), expected)


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("activation", "expected"), NOT_GATED, ids=str)
def test_activations_without_gate_are_the_golden_ones(
    activation: Any, expected: list[float], weight_layout: str
) -> None:
    close(layer_that_is_its_activation(activation, "packed", weight_layout), expected)


def test_a_limit_is_on_one_side_of_the_gate_and_on_both_of_up() -> None:
    config = config_of(1, 1, 2, 1, activation=ActivationConfig(function="silu", limit=2.0))
    weights = MoEWeights(gate_up=torch.eye(2)[None], down=torch.tensor([[[1.0], [0.0]]]))
    y = reference.moe_forward(config, weights, torch.tensor([[3.0, 5.0], [3.0, -5.0], [-3.0, 5.0]]), torch.zeros(3, 1))
    at_limit, below = 2.0 / (1.0 + math.exp(-2.0)), -3.0 / (1.0 + math.exp(3.0))
    close(y[:, 0], [at_limit * 2.0, at_limit * -2.0, below * 2.0])


# --- routing: golden vectors
# --------------------------------------------------------------------------------------------


def test_deepseek_v3_routing_is_the_golden_one() -> None:
    router = RouterConfig(
        scoring="sigmoid",
        correction_bias="scores",
        groups=GroupConfig(count=4, top_k=2, score="top2_sum"),
        routed_scaling_factor=2.5,
    )
    routing = route_once(Z8, 2, router, correction_bias=torch.tensor(B8))
    assert routing.expert_ids.tolist() == [[5, 4]]
    close(routing.weights, [[1.424435, 1.075565]])
    raw = dataclasses.replace(router, renormalize=False, routed_scaling_factor=1.0)
    close(route_once(Z8, 2, raw, correction_bias=torch.tensor(B8)).weights, [[0.5, 0.377541]])


def test_deepseek_v2_routing_is_the_golden_one() -> None:
    router = RouterConfig(groups=GroupConfig(count=4, top_k=2), renormalize=False)
    routing = route_once(Z8, 3, router)
    assert routing.expert_ids.tolist() == [[6, 3, 2]]
    close(routing.weights, [[0.591598, 0.217637, 0.048561]])


def test_sqrtsoftplus_routing_is_the_golden_one() -> None:
    router = RouterConfig(scoring="sqrtsoftplus", correction_bias="scores", routed_scaling_factor=1.5)
    routing = route_once(Z8, 2, router, correction_bias=torch.tensor(B8))
    assert routing.expert_ids.tolist() == [[5, 4]]
    close(routing.weights, [[0.821013, 0.678987]])
    everything = route_once(Z8, 8, RouterConfig(scoring="sqrtsoftplus", renormalize=False))
    by_id = everything.weights[0][everything.expert_ids[0].argsort()]
    close(by_id, [1.145976, 0.559698, 0.986953, 1.458399, 0.688532, 0.832555, 1.746020, 0.356270])


@pytest.mark.parametrize(
    ("logits", "ids", "expected"),
    [([2.0, 1.99, 1.0, 1.985], [0, 1], [0.336116, 0.501250]), ([2.0, 0.5, 0.495, -1.0], [0, 1], [1.0, 0.501250])],
)
def test_sparsemixer_is_the_golden_one(logits: list[float], ids: list[int], expected: list[float]) -> None:
    routing = route_once(logits, 2, RouterConfig(selection="sparsemixer", renormalize=False))
    assert routing.expert_ids.tolist() == [ids]
    close(routing.weights, [expected])


# --- routing: by hand
# ---------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_id_and_float32_ties_are_ties() -> None:
    assert route_once([1.0, 2.0, 2.0, 2.0, 1.0], 4, RouterConfig()).expert_ids.tolist() == [[1, 2, 3, 0]]
    nearly = [0.0, 1e-12]
    assert route_once(nearly, 1, RouterConfig(scoring="identity"), torch.float64).expert_ids.tolist() == [[1]]
    # Logits that the layer computes have x's dtype: 1 and 1 + 1e-9 are equal in float32, and differ in float64.
    gate = RouterWeights(gate=t64([1.0], [1.0 + 1e-9]))
    weights = scaling_weights([1.0, 5.0], router=gate)
    config = config_of(2, 1, router=RouterConfig(scoring="identity"), activation="relu_no_mul")
    close(reference.moe_forward(config, weights, torch.ones(1, 1)), [[1.0]])
    close(reference.moe_forward(config, weights, t64([1.0])), [[5.0]])


@pytest.mark.parametrize(
    ("scoring", "order", "logits", "ids", "expected"),
    [
        ("softmax", "before_top_k", [NAN, NAN, NAN], [0, 1], [0.0, 0.0]),
        ("softmax", "before_top_k", [0.0, INF, 0.0], [0, 1], [0.0, 0.0]),
        ("softmax", "before_top_k", [-INF, 0.0, -INF], [1, 0], [1.0, 0.0]),
        ("softmax", "after_top_k", [NAN, 1.0, 2.0], [2, 1], [0.731059, 0.268941]),
        ("softmax", "after_top_k", [INF, NAN, 2.0], [2, 0], [0.0, 0.0]),
        ("sigmoid", "before_top_k", [NAN, 0.0, INF], [2, 1], [2 / 3, 1 / 3]),
        ("sqrtsoftplus", "before_top_k", [INF, 0.0, NAN], [1, 0], [1.0, 0.0]),
        ("sqrtsoftplus", "before_top_k", [-INF, -2000.0, NAN], [0, 1], [0.0, 0.0]),
        ("identity", "before_top_k", [NAN, 3.0, -1.0], [1, 0], [1.0, 0.0]),
    ],
)
def test_rows_that_are_not_finite_select_distinct_ids_and_finite_weights(
    scoring: Any, order: Any, logits: list[float], ids: list[int], expected: list[float]
) -> None:
    z = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    config = config_of(3, 2, router=RouterConfig(scoring=scoring, scoring_order=order))
    routing = reference.route(config, scaling_weights([1.0] * 3), z)
    assert routing.expert_ids.tolist() == [ids]
    close(routing.weights, [expected])
    (grad,) = torch.autograd.grad((routing.weights * t64(1.0, 2.0)).sum(), z)
    assert grad.isfinite().all()


@pytest.mark.parametrize("logits", [[NAN] * 3, [-INF] * 3, [1.0, NAN, 0.5], [INF, 0.0, 0.0]])
def test_sparsemixer_rows_that_are_not_finite_have_distinct_ids_and_finite_weights(logits: list[float]) -> None:
    routing = route_once(logits, 2, RouterConfig(selection="sparsemixer", renormalize=False))
    assert len(set(routing.expert_ids[0].tolist())) == 2
    assert routing.weights.tolist() == [[0.0, 0.0]]


def test_a_logit_of_zero_is_kept_by_sparsemixer_when_the_best_is_zero() -> None:
    routing = route_once([0.0, -1.0, 0.0], 2, RouterConfig(selection="sparsemixer", renormalize=False))
    assert routing.expert_ids.tolist() == [[0, 2]]
    close(routing.weights, [[0.5, 1.0]])


def test_groups_filled_with_zero_let_an_expert_outside_win_with_weight_by_bias() -> None:
    groups = GroupConfig(count=2, top_k=1, fill="zero")
    plain = RouterConfig(scoring="identity", groups=groups, renormalize=False)
    assert route_once([2.0, -1.0, 1.0, 1.5], 2, plain).expert_ids.tolist() == [[0, 2]]
    close(route_once([2.0, -1.0, 1.0, 1.5], 2, plain).weights, [[2.0, 0.0]])
    biased = route_once(
        [2.0, -1.0, 1.0, 1.5], 2, dataclasses.replace(plain, correction_bias="scores"), correction_bias=torch.zeros(4)
    )
    assert biased.expert_ids.tolist() == [[0, 2]]
    close(biased.weights, [[2.0, 1.0]])
    inside = route_once([2.0, -1.0, 1.0, 1.5], 2, dataclasses.replace(plain, groups=GroupConfig(count=2, top_k=1)))
    close(inside.weights, [[2.0, -1.0]])


def test_a_group_is_worth_its_best_or_its_two_best_and_equal_groups_go_to_the_lowest() -> None:
    router = RouterConfig(scoring="identity", groups=GroupConfig(count=2, top_k=1))
    assert route_once([4.0, 0.0, 3.0, 2.0], 2, router).expert_ids.tolist() == [[0, 1]]
    two_best = dataclasses.replace(router, groups=GroupConfig(count=2, top_k=1, score="top2_sum"))
    assert route_once([4.0, 0.0, 3.0, 2.0], 2, two_best).expert_ids.tolist() == [[2, 3]]
    assert route_once([4.0, 0.0, 2.0, 2.0], 2, two_best).expert_ids.tolist() == [[0, 1]]


def test_limit_each_takes_the_best_of_every_group_group_by_group() -> None:
    router = RouterConfig(scoring="identity", groups=GroupConfig(count=2, top_k=2, limit="each"), renormalize=False)
    routing = route_once([1.0, 2.0, 5.0, 6.0], 2, router)
    assert routing.expert_ids.tolist() == [[1, 3]]
    close(routing.weights, [[2.0, 6.0]])


def test_a_bias_on_logits_chooses_and_the_weights_stay_unbiased() -> None:
    router = RouterConfig(scoring="sigmoid", scoring_order="after_top_k", correction_bias="logits", renormalize=False)
    routing = route_once([0.0, 1.0], 1, router, correction_bias=torch.tensor([2.0, 0.0]))
    assert routing.expert_ids.tolist() == [[0]]
    close(routing.weights, [[0.5]])


def test_renormalisation_has_order_epsilon_and_minimum_then_expert_scale_then_factor() -> None:
    router = RouterConfig(
        scoring="identity", renormalize_order=2.0, renormalize_epsilon=1.0, routed_scaling_factor=10.0
    )
    routing = route_once([3.0, 4.0, -9.0], 2, router, expert_scale=torch.tensor([2.0, 1.0, 1.0]))
    assert routing.expert_ids.tolist() == [[1, 0]]
    close(routing.weights, [[4 / 6 * 10, 3 / 6 * 2 * 10]])
    close(
        route_once([0.25, 0.25], 2, RouterConfig(scoring="identity", renormalize_minimum=2.0)).weights, [[0.125, 0.125]]
    )
    close(route_once([0.0, 0.0], 2, RouterConfig(scoring="identity", renormalize_order=2.0)).weights, [[0.0, 0.0]])


def test_multiplier_then_softcap() -> None:
    router = RouterConfig(scoring="identity", logit_multiplier=2.0, logit_softcap=4.0, renormalize=False)
    close(route_once([3.0], 1, router).weights, [[4.0 * math.tanh(1.5)]])


@pytest.mark.parametrize(
    ("order", "expected"), [("before_top_k", [[0.75, 0.0], [0.5, 0.5]]), ("after_top_k", [[1.0, 0.0], [0.5, 0.5]])]
)
def test_hash_routing_takes_the_ids_of_the_table_and_no_id_has_no_weight(
    order: Any, expected: list[list[float]]
) -> None:
    router = RouterConfig(selection="hash", scoring_order=order, renormalize=False)
    table = torch.tensor([[0, 1], [1, -1], [9, 9]])
    weights = scaling_weights([1.0, 1.0], router=RouterWeights(expert_ids_of_token=table))
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    routing = reference.route(config_of(2, 2, router=router), weights, logits, token_ids=torch.tensor([1, 0]))
    assert routing.expert_ids.tolist() == [[1, -1], [0, 1]]
    close(routing.weights, expected)


def test_shared_experts_of_the_router_share_the_renormalisation() -> None:
    router = RouterConfig(scoring="sigmoid", routed_scaling_factor=2.0)
    shared_config = SharedExpertsConfig(intermediate_size=1, gate="router", activation="relu_no_mul")
    config = config_of(2, 1, router=router, activation="relu_no_mul", shared=shared_config)
    shared = SharedWeights(gate_up=torch.ones(1, 1), down=torch.full((1, 1), 100.0))
    weights, logits = scaling_weights([1.0, 10.0], shared=shared), torch.tensor([[0.0, math.log(3.0), 0.0]])
    routing = reference.route(config, weights, logits)
    assert routing.expert_ids.tolist() == [[1]] and routing.shared_weights is not None
    close(routing.weights, [[1.2]])
    close(routing.shared_weights, [[0.8]])
    close(reference.moe_forward(config, weights, torch.ones(1, 1), logits), [[12.0 + 80.0]])


# --- the layer, by hand
# -------------------------------------------------------------------------------------------------

RELU: dict[str, Any] = {"activation": "relu_no_mul"}


def test_the_layer_is_the_weighted_sum_of_its_experts() -> None:
    ids = torch.tensor([[0, 2], [1, -1], [1, 1], [7, 0]])
    routing = Routing(expert_ids=ids, weights=t64([0.5, 2.0], [3.0, NAN], [0.5, 0.25], [NAN, 1.0]))
    y = reference.moe_forward_routed(
        config_of(3, 2, **RELU), scaling_weights([1.0, 10.0, 100.0]), torch.ones(4, 1), routing
    )
    close(y, [[200.5], [30.0], [7.5], [1.0]])


def test_leading_dims_stay_and_no_tokens_are_no_rows() -> None:
    config, weights = config_of(2, 1, 3, **RELU, router=RouterConfig()), scaling_weights([1.0, 2.0], hidden=3)
    config = dataclasses.replace(config, intermediate_size=3)
    x, logits = torch.rand(2, 4, 3), torch.randn(2, 4, 2)
    y = reference.moe_forward(config, weights, x, logits)
    assert y.shape == x.shape and y.dtype == torch.float64
    close(y.reshape(8, 3), reference.moe_forward(config, weights, x.reshape(8, 3), logits.reshape(8, 2)), 0.0)
    for shape in [(0,), (0, 4), (2, 0)]:
        empty = torch.zeros(*shape, 3, requires_grad=True)
        y = reference.moe_forward(config, weights, empty, torch.zeros(*shape, 2))
        assert y.shape == empty.shape
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert empty.grad is not None
    close(
        reference.moe_forward(config, weights, x[0, 0], logits[0, 0]),
        reference.moe_forward(config, weights, x, logits)[0, 0],
        0.0,
    )


def test_padding_gives_zero_rows_and_never_poisons_gradients() -> None:
    shared = SharedWeights(gate_up=torch.ones(1, 1), down=torch.ones(1, 1), down_bias=torch.ones(1))
    config = config_of(2, 2, **RELU, shared=SharedExpertsConfig(intermediate_size=1, activation="relu_no_mul"))
    weights = scaling_weights([1.0, 2.0], shared=shared, router=RouterWeights(gate=torch.ones(2, 1)))
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves_of_weights(weights)]
    x = torch.tensor([[1.0], [NAN]], requires_grad=True)
    logits = torch.tensor([[0.0, 0.0], [NAN, INF]], requires_grad=True)
    for given in (logits, None):
        y = reference.moe_forward(config, weights_of_leaves(leaves), x, given, token_mask=torch.tensor([True, False]))
        close(y, [[3.5], [0.0]])
        tensors = [x, *(leaf for leaf in leaves if leaf is not None)] + ([logits] if given is not None else [])
        for grad in torch.autograd.grad(y.square().sum(), tensors, allow_unused=True):
            assert grad is None or grad.isfinite().all()
    routing = reference.route(config, weights, logits, token_mask=torch.tensor([True, False]))
    assert routing.expert_ids.tolist() == [[0, 1], [-1, -1]]
    close(routing.weights, [[0.5, 0.5], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "expected"), [("identity", 0.25 * 10 + 0.5 * 3), ("zero", 2.5), ("constant", 2.5 + 0.5 * 7)]
)
def test_zero_experts_add_x_nothing_or_a_constant(kind: Any, expected: float) -> None:
    router = RouterConfig(scoring="identity", renormalize=False)
    config = config_of(1, 2, **RELU, zero_experts=ZeroExpertsConfig(count=2, kind=kind), router=router)
    weights = scaling_weights([10 / 3], constants=torch.tensor([[5.0], [7.0]]) if kind == "constant" else None)
    close(
        reference.moe_forward(config, weights, torch.full((1, 1), 3.0), torch.tensor([[0.25, 0.125, 0.5]])),
        [[expected]],
    )


def test_weight_on_the_input_is_inside_the_expert_and_only_there() -> None:
    router = RouterConfig(scoring="identity", renormalize=False, weight_on="input")
    config, weights = (
        config_of(1, 1, router=router, activation="relu2_no_mul"),
        scaling_weights([1.0], down_bias=torch.ones(1, 1)),
    )
    close(reference.moe_forward(config, weights, torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)), [[6.0**2 + 1.0]])
    outside = dataclasses.replace(config, router=dataclasses.replace(router, weight_on="output"))
    close(
        reference.moe_forward(outside, weights, torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)),
        [[3.0 * (2.0**2 + 1.0)]],
    )


@pytest.mark.parametrize(
    ("scale_on", "dtype", "expected"),
    [
        ("weights", torch.float16, 4 * 1.0 + 10.0),
        ("output", torch.float16, 4 * 1.0 + 10.0),
        ("output_float16_safe", torch.float16, 1.0 + 10.0 / 4),
        ("output_float16_safe", torch.bfloat16, 4 * 1.0 + 10.0),
    ],
)
def test_the_float16_rule_divides_the_shared_experts_instead(
    scale_on: Any, dtype: torch.dtype, expected: float
) -> None:
    shared = SharedExpertsConfig(intermediate_size=1, activation="relu_no_mul")
    config = config_of(1, 1, **RELU, router=RouterConfig(scale_on=scale_on, routed_scaling_factor=4.0), shared=shared)
    weights = scaling_weights([1.0], shared=SharedWeights(gate_up=torch.ones(1, 1), down=torch.full((1, 1), 10.0)))
    x, logits = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1)
    close(reference.moe_forward(config, weights, x, logits), [[expected]])
    averaged = dataclasses.replace(config, shared=dataclasses.replace(shared, combine="average"))
    close(reference.moe_forward(averaged, weights, x, logits), [[expected / 2]])
    close(reference.moe_forward(dataclasses.replace(config, shared=None), scaling_weights([1.0]), x, logits), [[4.0]])


def test_shared_experts_are_a_packed_mlp_with_a_sigmoid_gate() -> None:
    shared = SharedExpertsConfig(intermediate_size=1, count=2, gate="sigmoid", activation="relu")
    config = config_of(1, 1, **RELU, gate_up_layout="packed", shared=shared)
    weights = SharedWeights(
        gate_up=torch.tensor([[1.0], [2.0], [3.0], [4.0]]), down=torch.tensor([[1.0, 10.0]]),
        gate_up_bias=torch.ones(4), down_bias=torch.ones(1), gate=torch.full((1, 1), math.log(3.0)),
    )  # fmt: skip
    y = reference.moe_forward(config, scaling_weights([0.0], shared=weights), torch.ones(1, 1), torch.zeros(1, 1))
    close(y, [[0.75 * (2 * 4 + 10 * 3 * 5 + 1)]])


@pytest.mark.parametrize("scale", ["after", "before"])
def test_the_expert_norm_is_of_each_expert_before_its_weight(scale: Any) -> None:
    config = config_of(1, 1, 2, 2, **RELU, expert_norm=ExpertNormConfig(epsilon=0.5, scale=scale))
    weights = scaling_weights([1.0], hidden=2, expert_norm=torch.tensor([[2.0, 1.0]]))
    routing = Routing(expert_ids=torch.tensor([[0]]), weights=t64([3.0]))
    y = reference.moe_forward_routed(config, weights, torch.tensor([[1.0, 2.0]]), routing)
    close(
        y,
        [[3 * 2 / math.sqrt(3.0), 3 * 2 / math.sqrt(3.0)]]
        if scale == "after"
        else [[3 * 2 / math.sqrt(4.5), 3 * 2 / math.sqrt(4.5)]],
    )


def test_the_latent_space_has_norms_padding_and_the_gate_where_it_is_told() -> None:
    router = RouterConfig(
        gate_input="transformed", scoring="identity", renormalize=False, scale_on="output", routed_scaling_factor=2.0
    )
    config = config_of(
        1, 1, 1, 3, **RELU, latent=LatentConfig(size=2, norm_epsilon=0.0), hidden_padding=1, router=router
    )
    latent = LatentWeights(
        input=torch.tensor([[1.0], [6.0]]), input_bias=torch.tensor([0.0, 1.0]), input_norm=torch.tensor([5.0, 10.0]),
        output=torch.tensor([[1.0, 1.0]]), output_bias=torch.tensor([0.5]), output_norm=torch.tensor([1.0, 2.0]),
    )  # fmt: skip
    gate = RouterWeights(gate=torch.tensor([[1.0, 0.0, 99.0]]), bias=torch.tensor([1.0]))
    # x = 1: latent [1, 7], rms 5, normed [1, 14], padded [1, 14, 0]; logit 1 + 1 = 2; experts [1, 14, 1 of the bias],
    # cut off
    weights = scaling_weights([1.0], hidden=3, latent=latent, router=gate, down_bias=torch.tensor([[0.0, 0.0, 1.0]]))
    y = reference.moe_forward(config, weights, torch.ones(1, 1))
    rms = math.sqrt((1 + 14**2) / 2)  # the output norm cancels both weight and factor
    close(y, [[1 / rms + 2 * 14 / rms + 0.5]])
    bare = MoEWeights(**{**vars(weights), "latent": dataclasses.replace(latent, output_norm=None)})
    close(reference.moe_forward(config, bare, torch.ones(1, 1)), [[2.0 * 2.0 * 15 + 0.5]])


# --- losses
# -------------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    mask = torch.tensor([True, True, False])
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [NAN, NAN]])
    close(reference.router_z_loss(logits, token_mask=mask), (math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2)
    scores, ids = torch.tensor([[0.5, 0.5], [0.75, 0.25], [NAN, NAN]]), torch.tensor([[0, 1], [0, -1], [0, 0]])
    close(reference.load_balancing_loss(scores, ids, 2, token_mask=mask), 2 * (2 / 2 * 1.25 / 2 + 1 / 2 * 0.75 / 2))
    expected = 2 / (2 * 2) * (2 * 1.25 / 2 + 1 * 0.75 / 2)
    close(reference.sequence_balancing_loss(2 * scores[None], ids[None], 2, token_mask=mask[None]), expected)
    padded = torch.stack([mask, torch.zeros(3, dtype=torch.bool)])
    close(
        reference.sequence_balancing_loss(scores.expand(2, 3, 2), ids.expand(2, 3, 2), 2, token_mask=padded),
        expected / 2,
    )


def test_losses_of_no_tokens_are_zero() -> None:
    none, ids = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, 1, dtype=torch.int64)
    total = reference.router_z_loss(none) + reference.load_balancing_loss(none, ids, 2)
    for batch in (0, 2):
        total = total + reference.sequence_balancing_loss(
            none.reshape(0, 2).expand(batch, 0, 2), ids.expand(batch, 0, 1), 2
        )
    assert total.item() == 0.0
    total.backward()  # type: ignore[no-untyped-call]


# --- gradients
# ----------------------------------------------------------------------------------------------------------


def rich_problem(seed: int) -> tuple[MoEConfig, MoEWeights, Tensor, Tensor]:
    """Returns a tiny layer with every tensor that a layer can have at once."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = config_of(
        3, 2, 2, 2, activation=ActivationConfig(limit=1.5, alpha=1.2, up_offset=0.5, up_cap=3.0),
        gate_up_layout="interleaved", weight_layout="in_out", expert_norm=ExpertNormConfig(),
        latent=LatentConfig(size=2), hidden_padding=1,
        zero_experts=ZeroExpertsConfig(count=1, kind="constant"),
        shared=SharedExpertsConfig(intermediate_size=1, count=2, gate="router", combine="average"),
        router=RouterConfig(
            scoring="sqrtsoftplus", correction_bias="scores", renormalize_order=2.0, renormalize_epsilon=0.1,
            routed_scaling_factor=1.5,
            logit_multiplier=0.7, logit_softcap=5.0, gate_input="transformed",
        ),
    )  # fmt: skip
    weights = MoEWeights(
        gate_up=randn(3, 3, 4), down=randn(3, 2, 3), gate_up_bias=randn(3, 4), down_bias=randn(3, 3),
        expert_norm=randn(3, 3), constants=randn(1, 2),
        router=RouterWeights(gate=randn(6, 3), bias=randn(6), correction_bias=randn(4), expert_scale=randn(6)),
        shared=SharedWeights(gate_up=randn(4, 2), down=randn(2, 2), gate_up_bias=randn(4), down_bias=randn(2)),
        latent=LatentWeights(
            input=randn(2, 2), output=randn(2, 2), input_bias=randn(2), output_bias=randn(2), input_norm=randn(2),
            output_norm=randn(2)
        ),
    )  # fmt: skip
    return config, weights, randn(3, 2), randn(3, 6)


@pytest.mark.parametrize("with_logits", [True, False])
def test_gradients_of_a_rich_layer_pass_gradcheck(with_logits: bool) -> None:
    config, weights, x, logits = rich_problem(0)
    leaves = leaves_of_weights(weights)
    present = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    mask = torch.tensor([True, True, False])

    def layer(x: Tensor, logits: Tensor, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        given = weights_of_leaves([None if leaf is None else next(remaining) for leaf in leaves])
        return (
            reference.moe_forward(config, given, x, logits if with_logits else None, token_mask=mask) + 0 * logits.sum()
        )

    assert torch.autograd.gradcheck(layer, (x.requires_grad_(), logits.requires_grad_(), *present))


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(selection="sparsemixer", renormalize=False),
        RouterConfig(scoring="sigmoid", groups=GroupConfig(count=2, top_k=1), correction_bias="scores"),
        RouterConfig(scoring_order="after_top_k"),
        RouterConfig(scoring="identity", renormalize_minimum=0.1, renormalize_order=3.0),
    ],
    ids=["sparsemixer", "groups", "after_top_k", "identity"],
)
def test_gradients_of_routing_pass_gradcheck(router: RouterConfig) -> None:
    weights = scaling_weights([1.0] * 4, router=RouterWeights(correction_bias=t64(0.0, 0.5, 0.0, 0.1)))
    logits = t64([2.0, 1.99, 1.0, 1.98], [0.3, -0.7, 0.5, 0.45]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: reference.route(config_of(4, 2, router=router), weights, z).weights, (logits,)
    )
