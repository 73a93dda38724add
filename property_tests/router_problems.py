"""Routers and logits for the tests of kernels that route."""

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig, ZeroExpertsConfig

SEEDS = st.integers(0, 2**20)
WILD = torch.tensor([-20.0, 20.0, -40.0, torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-30, 0.0, -0.0, 88.0, -104.0])
NORMS = (
    {},
    {"renormalize": False, "routed_scaling_factor": 2.5},
    {"renormalize": False, "routed_scaling_factor": 2.5, "scale_on": "output"},
    {"renormalize_order": 2.0, "renormalize_epsilon": 1e-3},
    {"renormalize_minimum": 0.5, "routed_scaling_factor": 0.3},
)
LOGITS = ({}, {"logit_multiplier": 0.25}, {"logit_softcap": 1.5}, {"logit_multiplier": -2.0, "logit_softcap": 3.0})


def config_of(choices: int, top_k: int, router: RouterConfig, zero_experts: int = 0) -> MoEConfig:
    zero = ZeroExpertsConfig(count=zero_experts) if zero_experts else None
    return MoEConfig(
        num_experts=choices - zero_experts,
        top_k=top_k,
        hidden_size=1,
        intermediate_size=1,
        router=router,
        zero_experts=zero,
    )


@st.composite
def router_configs(draw: DrawFn, most_choices: int = 70) -> MoEConfig:
    """Draws configs that the kernel supports; with scale_on="output" zero experts are among the choices only
    where that is valid.
    """
    order = draw(st.sampled_from(["before_top_k", "after_top_k"]))
    bias = draw(st.sampled_from(["none", "scores", "logits"]))
    groups, choices = None, draw(st.integers(1, most_choices))
    if order == "before_top_k" and bias != "logits" and draw(st.booleans()):
        score, count = draw(st.sampled_from(["max", "top2_sum"])), draw(st.integers(1, 9))
        size = draw(st.integers(1 if score == "max" else 2, 7))
        groups = GroupConfig(
            count=count, top_k=draw(st.integers(1, count)), score=score, fill=draw(st.sampled_from(["-inf", "zero"]))
        )
        choices, most = count * size, groups.top_k * size
    else:
        most = choices
    norm = draw(st.sampled_from(NORMS))
    router = RouterConfig(
        scoring=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "identity"])),
        scoring_order=order,
        correction_bias=bias,
        groups=groups,
        **norm,
        **draw(st.sampled_from(LOGITS)),
    )
    zero = draw(st.integers(0, min(2, choices - 1))) if router.scale_on == "weights" else 0
    return config_of(choices, draw(st.integers(1, min(8, most))), router, zero)


def problem_of(config: MoEConfig, num_tokens: int, seed: int, wild: bool = False) -> tuple[Tensor, Tensor | None]:
    """Draws logits and correction bias on a grid of quarters, so that unequal values are far apart and ties
    are frequent.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, config.num_choices)
    logits = torch.randint(-12, 13, shape, generator=generator) / 4.0
    if wild:
        chosen = WILD[torch.randint(len(WILD), shape, generator=generator)]
        logits = torch.where(torch.rand(shape, generator=generator) < 0.4, chosen, logits)
    bias = (
        torch.randint(-8, 9, (config.num_choices,), generator=generator) / 4.0
        if config.router.correction_bias != "none"
        else None
    )
    return logits, bias
