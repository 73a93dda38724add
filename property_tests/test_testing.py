"""The tools of moe_fn.testing: strategies draw the documented values, and checks fail for wrong results."""

import collections
import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig, SharedExpertsConfig, ZeroExpertsConfig, as_activation
from moe_fn.config import router as router_module
from moe_fn.config.activation import PRESETS, GateFunction
from moe_fn.records import MoEWeights, Routing, leaves_of_weights
from moe_fn.testing import (
    TOLERANCES,
    MoEProblem,
    assert_matches,
    assert_one_graph,
    configs,
    count_graphs,
    problems,
    relative_rms,
    routings,
    weights_for,
)
from moe_fn.testing.option_rules import OPTIONS
from moe_fn.testing.values import GRID_HALF, GRID_OFFSET, GRID_STEP
from moe_fn.testing.weights import BIAS_STEP, SOFTMAX_BIAS_STEP
from moe_fn.torch_compat import mark_tokens

# The draws are deterministic; tests assert properties of all draws together.
_DRAWS = settings(
    max_examples=1600,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
_QUICK = settings(_DRAWS, max_examples=150)


def drawn(strategy: st.SearchStrategy[Any], how: settings = _DRAWS) -> list[Any]:
    values: list[Any] = []

    @how
    @given(strategy)
    def collect(value: Any) -> None:
        values.append(value)

    collect()
    return values


# ---- assert_matches
# ----------------------------------------------------------------------------------------------------------


def some(rows: int = 64, columns: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_passes_and_a_factor_of_0_6_does_not(dtype: torch.dtype) -> None:
    y = some()
    assert_matches(y.to(dtype), y)
    with pytest.raises(AssertionError, match=r"relative RMS error 0\.[34]"):
        assert_matches((0.6 * y).to(dtype), y)


def one_entry(change: Callable[[Tensor], Any]) -> Tensor:
    y = some()
    y[3, 5] = change(y[3, 5])
    return y


WRONG: dict[str, tuple[Any, Any, str]] = {
    "scaled a little": (some() * (1 + 1e-4), some(), "relative RMS error"),
    "NaN": (one_entry(lambda v: torch.nan), some(), r"NaN or infinity in 1 places.*worst at \[3, 5\]: got nan"),
    "infinity": (one_entry(lambda v: torch.inf), some(), "NaN or infinity"),
    "a number where NaN is expected": (some(), one_entry(lambda v: torch.nan), "NaN or infinity"),
    "the other infinity": (one_entry(lambda v: torch.inf), one_entry(lambda v: -torch.inf), "NaN or infinity"),
    "shape": (some(64, 16), some(64, 16)[:, :15], r"shape \[64, 16\], expected \[64, 15\]"),
    "a broadcastable shape": (some(1, 16), some(1, 16).squeeze(0), "shape"),
    "an integer off by one": (torch.tensor([3, 4]), torch.tensor([3, 5]), r"1 of 2 entries differ.*got 4, expected 5"),
    "a bool": (torch.tensor([True]), torch.tensor([False]), "1 of 1"),
    "floats for integers": (torch.tensor([3.0]), torch.tensor([3]), "kind of torch.int64"),
    "bools for integers": (torch.tensor([True]), torch.tensor([1]), "kind of torch.int64"),
    "something where zeros are expected": (torch.full((9,), 1e-6), torch.zeros(9), "zeros expected"),
    "nothing": (None, some(), "got None, expected a Tensor"),
    "something": (some(), None, "got a Tensor, expected None"),
    "a shorter tuple": ((some(),), (some(), some()), "got a tuple"),
    "a list for a tuple": ([some()], (some(),), "got a list"),
    "another key": ({"a": some()}, {"b": some()}, "got a dict"),
    "another number": (1, 2, "got 1, expected 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_caught(case: str) -> None:
    actual, expected, words = WRONG[case]
    with pytest.raises(AssertionError, match=words):
        assert_matches(actual, expected, name="y")


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1 + 1e-2), (torch.bfloat16, 0.6), (torch.float64, 1 + 1e-8)]
)
def test_one_bad_row_among_many_is_caught(dtype: torch.dtype, factor: float) -> None:
    y = some(rows=100_000)
    wrong = y.clone()
    wrong[77_777] *= factor
    assert relative_rms(wrong, y) < TOLERANCES[dtype] or dtype != torch.bfloat16, "the row must not change the mean"
    with pytest.raises(AssertionError, match=r"worst at \[77777"):
        assert_matches(wrong.to(dtype), y)


def test_records_are_compared_field_by_field() -> None:
    routing = Routing(expert_ids=torch.tensor([[0, 1]]), weights=torch.tensor([[0.25, 0.75]]))
    assert_matches(routing, dataclasses.replace(routing, weights=routing.weights.double()))
    with pytest.raises(AssertionError, match=r"routing\.expert_ids"):
        assert_matches(dataclasses.replace(routing, expert_ids=torch.tensor([[1, 0]])), routing, name="routing")
    with pytest.raises(AssertionError, match="shared_weights: got None"):
        assert_matches(routing, dataclasses.replace(routing, shared_weights=torch.ones(1, 1)))


def test_what_is_right_passes() -> None:
    assert_matches(torch.zeros(0, 3), torch.zeros(0, 3))
    assert_matches(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64))
    assert_matches(one_entry(lambda v: torch.nan), one_entry(lambda v: torch.nan))
    assert_matches(torch.zeros(3), torch.zeros(3))
    assert_matches((None, {"a": [some()]}), (None, {"a": [some()]}))
    assert_matches(torch.tensor([3], dtype=torch.int32), torch.tensor([3]))
    assert_matches(0.6 * some(), some(), tolerance=0.5)
    assert_matches(0.6 * some(), some(), tolerance={torch.float64: 0.5})
    cancelled = torch.tensor([1e-3 + 1e-7])
    assert_matches(cancelled, torch.tensor([1e-3]), scale=1.0)
    with pytest.raises(AssertionError):
        assert_matches(cancelled, torch.tensor([1e-3]))


def test_relative_rms() -> None:
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_rms(torch.ones(2), torch.zeros(2)) == torch.inf
    assert relative_rms(torch.zeros(0), torch.zeros(0)) == 0.0


# ---- assert_one_graph
# --------------------------------------------------------------------------------------------------------


def linear_args(count: int) -> tuple[Tensor, Tensor]:
    """Returns tokens of width 3, and a matrix whose first size is also 3, which must not be taken for tokens."""
    return some(count, 3, torch.float32), some(3, 3, torch.float32)


def good(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(x @ w) + x.sum(0)


def breaking(x: Tensor, w: Tensor) -> Tensor:
    x = x @ w
    torch._dynamo.graph_break()
    return x + 1


def with_nonzero(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w)[:, 0].nonzero()


def with_mask(x: Tensor, w: Tensor) -> Tensor:
    return x[x[:, 0] > 0] @ w


def with_item(x: Tensor, w: Tensor) -> Tensor:
    return x @ w * w.sum().item()


def with_bincount(x: Tensor, w: Tensor) -> Tensor:
    return torch.bincount((x[:, 0] > 0).long(), minlength=2)


def with_unique(x: Tensor, w: Tensor) -> Tensor:
    values: Tensor = torch.unique(x.round())
    return values


def with_repeats(x: Tensor, w: Tensor) -> Tensor:
    return x.repeat_interleave((x[:, 0] > 0).long(), 0)


def branching(x: Tensor, w: Tensor) -> Tensor:
    return x @ w if x.shape[0] > 5 else x @ w + 1


def differing(x: Tensor, w: Tensor) -> Tensor:
    return x @ w * (1.5 if torch.compiler.is_compiling() else 1.0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_one_graph_passes(backend: Any, fullgraph: bool, backward: bool) -> None:
    assert_one_graph(good, linear_args, fullgraph=fullgraph, backward=backward, backend=backend)


def test_one_graph_passes_on_inductor() -> None:
    assert_one_graph(good, linear_args, backward=True)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (breaking, "graph_break"),
        (with_nonzero, "nonzero"),
        (with_mask, "getitem depends on data|aten.nonzero|data-dependent|dynamic shape|index"),
        (with_item, "item"),
        (with_bincount, "bincount"),
        (with_unique, "unique"),
        (with_repeats, "repeat_interleave"),
        (branching, "data-dependent|graphs, expected exactly 1"),
        (differing, "compiled differs from eager"),
    ],
)
def test_one_graph_fails(fn: Callable[..., Tensor], words: str, fullgraph: bool) -> None:
    with pytest.raises(AssertionError, match=f"(?s){fn.__name__}.*({words})|({words}).*{fn.__name__}"):
        assert_one_graph(fn, linear_args, fullgraph=fullgraph, backend="aot_eager")


def test_data_dependence_is_seen_after_autograd_too() -> None:
    class Sneaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * torch.zeros_like(g).index_add(0, torch.arange(g.shape[0]), torch.ones_like(x))

    def sneaky(x: Tensor, w: Tensor) -> Tensor:
        return Sneaky.apply(x) @ w  # type: ignore[no-any-return, no-untyped-call]

    assert_one_graph(sneaky, linear_args, backward=True, backend="aot_eager")
    with pytest.raises(AssertionError, match=r"backward graph: aten\.index_add\.default is forbidden"):
        assert_one_graph(sneaky, linear_args, backward=True, backend="aot_eager", forbid=["aten.index_add"])


def test_one_graph_fails_on_a_recompile_per_token_count() -> None:
    def scaled(x: Tensor, tokens: int) -> Tensor:
        return x * tokens

    with pytest.raises(AssertionError, match=r"scaled at \d+ tokens: RecompileError.*tokens"):
        assert_one_graph(scaled, lambda count: (torch.ones(count, 2), count), backend="eager")


def test_wrong_gradients_are_caught() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (3.0 if torch.compiler.is_compiling() else 2.0)

    def wrong(x: Tensor) -> Tensor:
        return Wrong.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(AssertionError, match="gradient of differentiable argument 0"):
        assert_one_graph(wrong, lambda count: (torch.ones(count, 2),), backward=True, backend="aot_eager")
    with pytest.raises(AssertionError, match="no result depends"):
        assert_one_graph(lambda x: x.detach(), lambda count: (torch.ones(count, 2),), backward=True, backend="eager")


def test_records_and_configs_are_arguments() -> None:
    config = MoEConfig(num_experts=3, top_k=1, hidden_size=2, intermediate_size=4)
    weights = weights_for(config, requires_grad=True)

    def layer(config: MoEConfig, weights: MoEWeights, x: Tensor, ids: Tensor | None) -> Tensor:
        return x @ weights.gate_up.sum(0).T * config.top_k

    assert_one_graph(
        layer, lambda count: (config, weights, torch.ones(count, 2), None), backward=True, backend="aot_eager"
    )


def test_count_graphs() -> None:
    calls = [(torch.ones(count, 2), torch.ones(2, 2)) for count in (4, 7, 1, 0)]
    assert count_graphs(good, calls).graphs == 4
    counts = count_graphs(breaking, calls[:1])
    assert (counts.graphs, counts.breaks) == (2, 1) and "graph_break" in counts.break_reasons[0]


def test_mark_tokens() -> None:
    x = torch.ones(2, 3)
    mark_tokens(x, None, dim=-1)
    assert x._dynamo_unbacked_indices == {1}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="mark_tokens: expected tensors"):
        mark_tokens(torch.ones(()))
    with pytest.raises(ValueError, match="got 3"):
        mark_tokens(3)  # type: ignore[arg-type]


# ---- configs
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_configs() -> list[MoEConfig]:
    return drawn(configs())


def test_drawn_configs_round_trip_through_json(some_configs: list[MoEConfig]) -> None:
    assert len(some_configs) >= 300
    for config in some_configs:
        assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def features(config: MoEConfig) -> Iterator[tuple[str, Any]]:
    """Returns (option, value) of every field, nested configs included."""
    router = config.router
    for name in OPTIONS:
        owner = router if hasattr(router, name) else config
        value = getattr(owner, name)
        yield name, (value if isinstance(value, str | int | float | type(None)) else "a config")
    for part in (router.groups, config.shared, config.zero_experts, config.expert_norm):
        if part is not None:
            for field in dataclasses.fields(part):
                yield f"{type(part).__name__}.{field.name}", getattr(part, field.name)
    for activation in (config.activation, *([config.shared.activation] if config.shared else [])):
        yield "preset", activation if isinstance(activation, str) else "custom"
        for field in dataclasses.fields(as_activation(activation)):
            yield f"activation.{field.name}", getattr(as_activation(activation), field.name)
    yield "num_experts", config.num_experts
    yield "dense", config.top_k == config.num_choices
    yield "one", config.top_k == 1
    yield "hidden_size", config.hidden_size


LITERALS: dict[str, tuple[Any, ...]] = {
    "scoring": get_args(router_module.Scoring),
    "scoring_order": get_args(router_module.ScoringOrder),
    "selection": get_args(router_module.Selection),
    "correction_bias": get_args(router_module.CorrectionBias),
    "scale_on": get_args(router_module.ScaleOn),
    "GroupConfig.score": ("max", "top2_sum"),
    "GroupConfig.fill": ("-inf", "zero"),
    "GroupConfig.limit": ("groups", "each"),
    "GroupConfig.count": (1, 2, 3, 4),
    "SharedExpertsConfig.gate": ("none", "sigmoid", "router"),
    "SharedExpertsConfig.combine": ("sum", "average"),
    "SharedExpertsConfig.count": (1, 2, 3),
    "ZeroExpertsConfig.kind": ("identity", "zero", "constant"),
    "ZeroExpertsConfig.count": (1, 2, 3),
    "ExpertNormConfig.scale": ("before", "after"),
    "preset": (*PRESETS, "custom"),
    "activation.function": get_args(GateFunction),
    "activation.limit_at": ("input", "output"),
    "activation.gated": (True, False),
    "num_experts": tuple(range(1, 9)),
    "hidden_size": tuple(range(1, 13)),
    "dense": (True, False),
    "one": (True, False),
}


def test_drawn_configs_hit_every_option(some_configs: list[MoEConfig]) -> None:
    seen: dict[str, set[Any]] = collections.defaultdict(set)
    for config in some_configs:
        for name, value in features(config):
            seen[name].add(value)
    kinds = ("groups", "zero_experts", "shared", "latent", "expert_norm")
    missing = {name: set(values) - seen[name] for name, values in LITERALS.items()}
    missing |= {name: {None, "a config"} - seen[name] for name in kinds}
    missing |= {
        name: set(values) - seen[name] for name, values in OPTIONS.items() if name not in (*kinds, "activation")
    }
    assert {name: values for name, values in missing.items() if values} == {}


def test_every_field_of_the_configs_is_drawn() -> None:
    """A new field needs a row in OPTIONS."""
    sizes = {"num_experts", "top_k", "hidden_size", "intermediate_size", "router"}
    fields = {f.name for cls in (MoEConfig, RouterConfig) for f in dataclasses.fields(cls)}
    assert fields == set(OPTIONS) | sizes


PAIRS = [
    ("selection", "scoring"),
    ("selection", "shared"),
    ("scoring", "scoring_order"),
    ("scale_on", "zero_experts"),
    ("weight_on", "groups"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_whatever_pair_is_valid_can_be_fixed(pair: tuple[str, str]) -> None:
    """Fixed fields never give an invalid config: other fields are drawn to fit, or a ValueError names the fields that
    contradict each other.
    """
    values: dict[str, tuple[Any, ...]] = {
        **OPTIONS,
        "shared": (
            None,
            *(SharedExpertsConfig(intermediate_size=2, gate=gate) for gate in ("none", "sigmoid", "router")),
        ),
        "zero_experts": (None, ZeroExpertsConfig(count=2)),
        "groups": (None, GroupConfig(count=3, top_k=2, score="top2_sum"), GroupConfig(count=2, top_k=2, limit="each")),
    }
    contradictions = 0
    for first, second in itertools.product(dict.fromkeys(values[pair[0]]), dict.fromkeys(values[pair[1]])):
        strategy = configs(**{pair[0]: first, pair[1]: second})
        try:
            some = drawn(strategy, settings(_DRAWS, max_examples=8))
        except ValueError as error:
            assert "do not go together" in str(error)
            contradictions += 1
            continue
        for config in some:
            got = [getattr(config.router if hasattr(config.router, name) else config, name) for name in pair]
            assert got == [first, second]
    assert contradictions <= 4


@pytest.mark.parametrize(
    "fixed",
    [
        {"num_experts": 1}, {"num_experts": 5, "top_k": 5}, {"top_k": 7}, {"top_k": 11}, {"gate_input": "transformed"},
        {"gate_input": "transformed", "latent": None}, {"gate_up_layout": "interleaved"}, {"activation": "relu_no_mul"},
        {"opaque": True},
        {"renormalize_order": 2.0}, {"sparsemixer_epsilon": 0.07},
        {"groups": GroupConfig(count=5, top_k=5, limit="each")},
        {"router": RouterConfig(scoring="sigmoid", groups=GroupConfig(count=4, top_k=2))},
        {"weight_on": "input", "num_experts": 2},
        {"chunk_tokens": st.integers(1, 4)}, {"zero_experts": ZeroExpertsConfig(count=5)},
        {"hidden_size": 64, "intermediate_size": 32},
        {"routed_scaling_factor": 0.0}, {"latent": None, "hidden_padding": 0}, {"num_experts": 16, "top_k": 2},
    ],
    ids=str,
)  # fmt: skip
def test_fixed_fields_are_kept(fixed: dict[str, Any]) -> None:
    for config in drawn(configs(**fixed), settings(_DRAWS, max_examples=40)):
        for name, value in fixed.items():
            got = getattr(config if hasattr(config, name) else config.router, name)
            assert 1 <= got <= 4 if isinstance(value, st.SearchStrategy) else got == value


def test_unknown_and_contradicting_fields_raise() -> None:
    with pytest.raises(TypeError, match="unknown fields \\['topk'\\]"):
        configs(topk=1)
    for fixed in (
        {"selection": "hash", "correction_bias": "scores"},
        {"num_experts": 2, "zero_experts": None, "top_k": 3},
    ):
        with pytest.raises(ValueError, match="fixed"):
            drawn(configs(**fixed), settings(_DRAWS, max_examples=2))


def test_configs_shrink_to_the_simplest() -> None:
    # phases: mutation testing runs tests with a profile that does not shrink
    phases = [Phase.generate, Phase.shrink]
    how = settings(max_examples=200, derandomize=True, database=None, phases=phases)
    config = find(configs(), lambda config: True, settings=how)
    assert config == MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1)
    config = find(
        configs(), lambda config: config.router.groups is not None and config.router.groups.count > 1, settings=how
    )
    assert config.num_choices <= 4 and config.latent is None and config.shared is None


# ---- weights, problems, routings
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_fit_their_config(some_configs: list[MoEConfig], dtype: torch.dtype) -> None:
    from moe_fn.weights.check import check_weights
    from moe_fn.weights.shapes import expected_shapes

    for config in some_configs[::4]:
        full = weights_for(config, 1, dtype=dtype, requires_grad=True)
        check_weights("here", config, full, torch.zeros(1, config.hidden_size, dtype=dtype))
        check_weights(
            "here",
            config,
            weights_for(config, 1, dtype=dtype, bias=False, scales=False),
            torch.zeros(1, config.hidden_size, dtype=dtype),
        )
        given = sum(leaf is not None for leaf in leaves_of_weights(full))
        assert given == len(expected_shapes(config)), "with all flags on, every tensor that the config can use is there"
        assert full.router is not None and full.router.gate is not None
        assert full.router.gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert full.gate_up.dtype == dtype and full.gate_up.requires_grad and full.gate_up.is_leaf


def test_weights_come_from_the_seed() -> None:
    config = MoEConfig(
        num_experts=4, top_k=2, hidden_size=256, intermediate_size=512, router=RouterConfig(selection="hash")
    )
    first, same, other = weights_for(config, 1), weights_for(config, 1), weights_for(config, 2)
    assert_matches(first, same, tolerance=0.0)
    with pytest.raises(AssertionError):
        assert_matches(first, other)
    assert abs(float(first.gate_up.std()) * 16 - 1) < 0.02 and abs(float(first.down.std()) * 512**0.5 - 1) < 0.02
    assert first.router is not None and first.router.expert_ids_of_token is not None
    assert all(len(set(ids)) == 2 for ids in first.router.expert_ids_of_token.tolist())


@pytest.fixture(scope="module")
def some_problems() -> list[MoEProblem]:
    return drawn(problems(), settings(_DRAWS, max_examples=800))


def test_problems_fit_together(some_problems: list[MoEProblem]) -> None:
    for problem in some_problems:
        leading = problem.x.shape[:-1]
        assert problem.x.shape == (*leading, problem.config.hidden_size)
        assert problem.logits is None or problem.logits.shape == (*leading, problem.config.num_logits)
        assert (problem.token_ids is not None) == (problem.config.router.selection == "hash")
        assert problem.token_mask is None or problem.token_mask.shape == leading
        gate = None if problem.weights.router is None else problem.weights.router.gate
        assert (problem.logits is None) == (gate is not None)
        real = problem.x if problem.token_mask is None else problem.x[problem.token_mask]
        assert real.isfinite().all()
        assert problem.token_mask is None or not problem.x[~problem.token_mask][..., :3].isfinite().any()
        assert len(repr(problem)) < 4000


def test_problems_are_adversarial(some_problems: list[MoEProblem]) -> None:
    seen = collections.Counter[str]()
    for problem in some_problems:
        tokens = problem.x.shape[:-1].numel()
        seen["no tokens"] += tokens == 0
        seen["one token"] += tokens == 1
        seen["batch"] += problem.x.ndim == 3
        seen["gate inside"] += problem.logits is None
        seen["hash"] += problem.token_ids is not None
        seen["mask"] += problem.token_mask is not None
        seen["all padding"] += tokens > 0 and problem.token_mask is not None and not bool(problem.token_mask.any())
        seen["no router weights"] += problem.weights.router is None
        seen["biases"] += problem.weights.gate_up_bias is not None
        if problem.logits is not None and problem.token_mask is None and tokens > 2 and problem.config.num_logits > 2:
            logits = problem.logits.reshape(tokens, -1)
            seen["ties"] += any(len(set(row)) < len(row) for row in logits.tolist())
            seen["all equal"] += bool((logits == logits[0, 0]).all())
            seen["one expert"] += len(set(logits.argmax(-1).tolist())) == 1 and bool((logits.amax(-1) > 4).all())
    wanted = (
        "no tokens",
        "one token",
        "batch",
        "gate inside",
        "hash",
        "mask",
        "all padding",
        "no router weights",
        "biases",
        "ties",
        "all equal",
    )
    assert all(seen[name] >= 5 for name in (*wanted, "one expert")), seen


def test_scores_tie_exactly_or_are_far_apart() -> None:
    """The property that values.py documents, for every function of a logit that configs() draws, and of pairs
    (top2_sum).
    """
    z = (torch.arange(-GRID_HALF, GRID_HALF + 1) * GRID_STEP + GRID_OFFSET).double()
    assert (z.to(torch.bfloat16).double() == z).all()
    assert float(torch.tensor(BIAS_STEP)) == BIAS_STEP and float(torch.tensor(SOFTMAX_BIAS_STEP)) == SOFTMAX_BIAS_STEP
    for multiplier, cap in itertools.product(OPTIONS["logit_multiplier"], OPTIONS["logit_softcap"]):
        scaled = z * multiplier if cap is None else cap * torch.tanh(z * multiplier / cap)
        for score in (torch.sigmoid, lambda v: torch.nn.functional.softplus(v).sqrt(), lambda v: v):
            values = score(scaled)
            pairs = values[:, None] + values  # symmetric: (a, b) and (b, a) have the same sum
            sums = pairs[torch.triu_indices(17, 17).unbind()]
            exact = score(z) is z and cap is None  # sums of grid points are exact, so equal sums are equal floats
            for group, steps in ((values, 2), (sums, 4)):
                biases = torch.arange(-steps, steps + 1).double() * BIAS_STEP
                different = (group[:, None] - group)[:, :, None] + biases
                same = torch.eye(len(group), dtype=torch.bool)[:, :, None] & (biases == 0)
                same = same | ((different == 0) if exact else torch.zeros_like(same))
                assert float(different.abs()[~same].min()) > 3e-6, (multiplier, cap)
        softmax_pairs = (scaled.exp()[:, None] + scaled.exp())[torch.triu_indices(17, 17).unbind()]
        ordered = softmax_pairs.sort().values
        assert float((ordered.diff() / ordered[1:]).min()) > 3e-6
        largest = scaled.max()
        for epsilon in OPTIONS["sparsemixer_epsilon"]:
            ratio = (scaled[:, None] - scaled) / torch.maximum(scaled.abs(), scaled[:, None])
            assert float((ratio - 2 * epsilon).abs().min()) > 1e-5 and largest > 0


def test_gates_inside_are_exact() -> None:
    fixed = {"gate_input": "original", "gate_dtype": "float32"}
    for problem in drawn(problems(configs(**fixed), dtype=torch.bfloat16, logits="gate"), _QUICK):
        router = problem.weights.router
        assert router is not None and router.gate is not None and router.gate.dtype == torch.float32
        x = problem.x if problem.token_mask is None else problem.x[problem.token_mask]
        logits = x.float() @ router.gate.T
        assert (logits.double() == x.double() @ router.gate.double().T).all() and (
            logits * 32 == (logits * 32).round()
        ).all()


def test_problems_of_a_kind() -> None:
    for problem in drawn(problems(tokens=st.just(4), dtype=torch.float64, logits="normal"), _QUICK):
        assert problem.x.dtype == problem.weights.down.dtype == torch.float64 and problem.logits is not None
        assert problem.x.shape[:-1].numel() == 4
    for problem in drawn(problems(dtype=torch.bfloat16), _QUICK):
        assert problem.config.router.score_dtype == "float32"
    with pytest.raises(ValueError, match="logits is 'gird'"):
        drawn(problems(logits="gird"), _QUICK)  # type: ignore[arg-type]


def test_problems_are_the_same_every_time() -> None:
    how = settings(_DRAWS, max_examples=20)
    for first, second in zip(drawn(problems(), how), drawn(problems(), how), strict=True):
        assert first.config == second.config
        parts = [(p.weights, p.x, p.logits, p.token_ids, p.token_mask) for p in (first, second)]
        assert_matches(*parts, tolerance=0.0)


def test_routings_are_what_somebody_elses_router_may_make() -> None:
    config = MoEConfig(
        num_experts=4, top_k=3, hidden_size=2, intermediate_size=2, zero_experts=ZeroExpertsConfig(count=1),
        router=RouterConfig(scoring="sigmoid"), shared=SharedExpertsConfig(intermediate_size=2, count=2, gate="router"),
    )  # fmt: skip
    seen = collections.Counter[str]()
    for routing in drawn(routings(config), settings(_DRAWS, max_examples=500)):
        ids, weights = routing.expert_ids, routing.weights
        assert (
            ids.dtype == torch.int64 and ids.shape == weights.shape and ids.shape[1] == 3 and weights.isfinite().all()
        )
        assert routing.shared_weights is not None and routing.shared_weights.shape == (len(ids), 2)
        assert ((ids >= -1) & (ids < 5)).all()
        rows = ids.tolist()
        seen["empty"] += not rows
        seen["none"] += bool((ids == -1).any())
        seen["zero expert"] += bool((ids == 4).any())
        seen["duplicates"] += any(len(set(row)) < 3 for row in rows)
        seen["out of order"] += any(row != sorted(row) for row in rows)
        seen["one expert"] += len(rows) > 3 and bool((ids == ids[0, 0]).all())
        seen["negative"] += bool((weights < 0).any())
        seen["above one"] += bool((weights > 1).any())
        seen["zero weight"] += bool((weights == 0).any())
    assert len(seen) == 9 and all(count >= 5 for count in seen.values()), seen
    assert len(find(routings(config), lambda routing: bool((routing.expert_ids == 3).sum() >= 2)).expert_ids) == 1


def test_call_and_replace() -> None:
    problem = find(
        problems(tokens=st.just(2)),
        lambda problem: problem.token_ids is not None and problem.token_mask is not None,
        settings=_DRAWS,  # as it is found: shrinking takes two seconds
    )
    got = problem.call(lambda *args, **kwargs: (args, kwargs))
    assert got == (
        (problem.config, problem.weights, problem.x, problem.logits),
        {"token_ids": problem.token_ids, "token_mask": problem.token_mask},
    )
    assert problem.replace(token_mask=None).token_mask is None and problem.token_mask is not None


def test_without_hypothesis_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "moe_fn.testing")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install moe_fn\[testing\]"):
        importlib.import_module("moe_fn.testing")
