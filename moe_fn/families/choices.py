"""Words that name a function which a family always computes: they have to name that one, for no row reads them."""

from collections.abc import Mapping
from typing import Any

from moe_fn.config import MoEConfig
from moe_fn.families.row import Family

_SCORES = (
    "scoring_func",
    "score_func",
    "score_function",
    "moe_router_activation_func",
    "moe_router_activation",
    "expert_selection_fn",
)
_BIASED = "noaux_tc"  # a choice of experts that a correction bias changes; dots.llm1 calls its scores so as well


def check_choices(family: Family, config: MoEConfig, words: Mapping[str, Any]) -> None:
    """Raises ValueError where a config's words name other scores, or another way to choose, than the config has."""
    biased = family.router.get("correction_bias", "none") != "none"
    scores = (config.router.scoring, *([_BIASED] if biased else []))
    methods = (_BIASED,) if biased else _methods(family, config)
    zero = (config.zero_experts.kind,) if config.zero_experts is not None else ("identity", "zero")
    for name, expected in (*((name, scores) for name in _SCORES), ("topk_method", methods), ("zero_expert_type", zero)):
        if words.get(name) is not None and words[name] not in expected:
            known = " or ".join(map(repr, expected))
            raise ValueError(
                f"{name} is {words[name]!r:.80} in the model's config; expected {known}, which {family.names[0]} "
                "computes"
            )


def _methods(family: Family, config: MoEConfig) -> tuple[str, ...]:
    """The names of a choice without a correction bias.

    Of one group that one is kept: limiting to groups changes nothing.
    """
    if config.router.groups is not None:
        return ("group_limited_greedy",)
    return ("greedy", "group_limited_greedy") if family.router.get("groups") else ("greedy",)
