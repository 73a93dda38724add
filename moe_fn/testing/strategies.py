"""Hypothesis strategies of the arguments of a layer: problems() and routings()."""

import dataclasses
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import MoEWeights, Routing
from moe_fn.testing.config_strategies import configs as configs_strategy
from moe_fn.testing.problem import MoEProblem
from moe_fn.testing.values import (
    GRID_KINDS,
    exact_gate,
    exact_gate_bias,
    logits_of_kind,
    needs_gate_bias,
    poison,
    x_of_shape,
)
from moe_fn.testing.weights import weights_for

Logits = Literal["any", "grid", "gate", "normal"]

_TOKENS = st.integers(0, 17)
_SEEDS = st.integers(0, 2**32 - 1)
_BOOLEANS = st.booleans()
_EVERY_CONFIG = configs_strategy()
# In narrow dtypes, rounding of scores or of a gate in the input's dtype is so coarse that the choice of experts differs
# from that in float64.
_NARROW_CONFIGS = configs_strategy(score_dtype="float32", gate_dtype="float32")
_MASKED = st.sampled_from(("none", "none", "some", "some", "all"))
_VOCABULARY = 16


def problems(
    configs: SearchStrategy[MoEConfig] | None = None,
    tokens: SearchStrategy[int] = _TOKENS,
    dtype: torch.dtype = torch.float32,
    logits: Logits = "any",
    device: torch.device | str = "cpu",
) -> SearchStrategy[MoEProblem]:
    """Strategy of problems: a config, weights that fit it, inputs, and logits or a gate inside the layer.

    configs  strategy of configs; None: `configs()`, for bfloat16 and float16 with gate_dtype and score_dtype "float32"
    tokens   strategy of the number of tokens, including 0 and 1; they have shape [T] or sometimes [B, S]
    logits   "grid": values that tie exactly or are far apart (see `values.py`): spread, few values, one expert for all
             tokens, or all equal; "gate": None, with a gate inside the layer whose products are exact; "any": either;
             "normal": continuous, near-ties possible. With gate_input="transformed" near-ties are always possible

    Some problems have a token_mask, with NaN and infinities in x and logits of padding; hash routing has token_ids.
    Optional weights are sometimes omitted; a config with LoRA (which `configs()` does not draw) has adapter_ids. Values
    come from a drawn seed; sizes and options shrink.

    >>> from hypothesis import find
    >>> find(problems(tokens=st.just(3), logits="grid"), lambda problem: problem.config.num_experts > 1).x[...,
    ...     0].numel()
    3
    """
    if configs is None:
        configs = _EVERY_CONFIG if dtype in (torch.float32, torch.float64) else _NARROW_CONFIGS
    return _problems(configs, tokens, dtype, logits, torch.device(device))


@st.composite
def _problems(
    draw: DrawFn,
    configs: SearchStrategy[MoEConfig],
    tokens: SearchStrategy[int],
    dtype: torch.dtype,
    logits: Logits,
    device: torch.device,
) -> MoEProblem:
    config = draw(configs)
    leading = draw(_leading_dims(draw(tokens)))
    kind = draw(_kinds_of_logits(logits))
    masked = draw(_MASKED)
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    weights = draw(_weights(config, generator, dtype, kind))
    token_mask = (
        None if masked == "none" else torch.rand(leading, generator=generator) > {"some": 0.3, "all": 1.0}[masked]
    )
    x = x_of_shape((*leading, config.hidden_size), generator).to(dtype)
    own_logits = None if kind == "gate" else logits_of_kind(kind, (*leading, config.num_logits), generator).to(dtype)
    if token_mask is not None:
        x, own_logits = poison(x, token_mask), None if own_logits is None else poison(own_logits, token_mask)
    token_ids = torch.randint(_VOCABULARY, leading, generator=generator) if config.router.selection == "hash" else None
    problem = MoEProblem(
        config=config, weights=weights, x=x, logits=own_logits, token_ids=token_ids, token_mask=token_mask
    )
    problem = problem if config.lora is None else _with_adapters(draw, config, problem, leading, generator)
    return problem if device.type == "cpu" else _moved(problem, device)


def _with_adapters(
    draw: DrawFn, config: MoEConfig, problem: MoEProblem, leading: tuple[int, ...], generator: torch.Generator
) -> MoEProblem:
    """The problem with adapter ids, including -1 and one out of range, and sometimes adapters of only one product."""
    lora, without = problem.weights.lora, draw(st.sampled_from((None, None, "gate_up", "down")))
    if lora is not None and without is not None:
        lora = dataclasses.replace(lora, **{f"{without}_a": None, f"{without}_b": None})
    adapters = config.lora.num_adapters if config.lora is not None else 1
    ids = None if adapters == 1 and draw(_BOOLEANS) else torch.randint(-1, adapters + 1, leading, generator=generator)
    return problem.replace(weights=dataclasses.replace(problem.weights, lora=lora), adapter_ids=ids)


def _leading_dims(tokens: int) -> SearchStrategy[tuple[int, ...]]:
    flat: tuple[int, ...] = (tokens,)
    batches = [(batch, tokens // batch) for batch in range(1, tokens + 1) if tokens % batch == 0] or [(0, 3), (2, 0)]
    return st.sampled_from([flat] * max(1, len(batches)) + batches)


def _kinds_of_logits(logits: Logits) -> SearchStrategy[str]:
    kinds = {"any": (*GRID_KINDS, "gate", "gate"), "grid": GRID_KINDS, "gate": ("gate",), "normal": ("normal",)}
    if logits not in kinds:
        raise ValueError(f"problems: logits is {logits!r}; expected one of {', '.join(map(repr, kinds))}")
    return st.sampled_from(kinds[logits])


@st.composite
def _weights(draw: DrawFn, config: MoEConfig, generator: torch.Generator, dtype: torch.dtype, kind: str) -> MoEWeights:
    """Weights with optional ones sometimes omitted, and an exact gate if the gate is used."""
    bias, scales = draw(_BOOLEANS), draw(_BOOLEANS)
    weights = weights_for(config, generator, dtype=dtype, bias=bias, scales=scales, vocabulary=_VOCABULARY)
    router = weights.router
    if router is None or router.gate is None:
        return weights
    if kind == "gate":
        bias_of_gate = exact_gate_bias(router.gate[:, 0], generator) if bias or needs_gate_bias(config.router) else None
        router = dataclasses.replace(router, gate=exact_gate(router.gate, generator), bias=bias_of_gate)
    else:  # the gate is outside the layer where logits are given
        router = dataclasses.replace(router, gate=None, bias=None)
    empty = all(getattr(router, field.name) is None for field in dataclasses.fields(router))
    return dataclasses.replace(weights, router=None if empty else router)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, MoEConfig | type):
        return dataclasses.replace(
            value, **{f.name: _moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        )
    return value


@st.composite
def routings(draw: DrawFn, config: MoEConfig, tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Routing:
    """Strategy of arbitrary routings: ids in any order, repeated within a token, -1 for no expert, all one expert.

    expert_ids [tokens, top_k] int64 in -1 .. num_choices - 1; weights of `dtype`, some negative, above one or zero;
    shared_weights if the config has them. tokens=None draws 0 to 17. Ids are drawn as rows, so a failing case shrinks
    to few tokens; weights come from a seed.

    >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=3, intermediate_size=5)
    >>> from hypothesis import find
    >>> find(routings(config), lambda routing: bool((routing.expert_ids == 3).any())).expert_ids.shape
    torch.Size([1, 2])
    """
    fewest, most = (0, 17) if tokens is None else (tokens, tokens)
    ids = st.integers(-1, config.num_choices - 1)
    one_expert = ids.map(lambda expert: (expert,) * config.top_k)
    row = draw(st.sampled_from((st.tuples(*[ids] * config.top_k), st.just(draw(one_expert)))))
    rows = draw(st.lists(row, min_size=fewest, max_size=most))
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    expert_ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), config.top_k)
    weights = torch.randn(expert_ids.shape, generator=generator) * 1.5
    weights = torch.where(torch.rand(expert_ids.shape, generator=generator) < 0.1, 0.0, weights)
    shared_count = config.num_logits - config.num_choices
    shared = torch.rand(len(rows), shared_count, generator=generator).to(dtype) if shared_count else None
    return Routing(expert_ids=expert_ids, weights=weights.to(dtype), shared_weights=shared)
