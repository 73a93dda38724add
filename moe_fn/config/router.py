"""Config of the router: how logits become expert ids and routing weights."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from moe_fn.checks import check_bool, check_choice, check_float, check_int

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]
ScoringOrder = Literal["before_top_k", "after_top_k"]
Selection = Literal["top_k", "sparsemixer", "hash"]
CorrectionBias = Literal["none", "scores", "logits"]
ScaleOn = Literal["weights", "output", "output_float16_safe"]
Precision = Literal["float32", "input"]
# Every scoring, and whether the score of an expert is a function of its own logit alone.
SCORINGS: dict[str, bool] = {"softmax": False, "sigmoid": True, "sqrtsoftplus": True, "identity": True}


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Group-limited routing: of `count` groups of consecutive experts keep the `top_k` best, then choose inside them.

    score  the score of a group: its best expert ("max", DeepSeek-V2), or the sum of its two best ("top2_sum",
           DeepSeek-V3)
    fill   the selection score of experts outside the kept groups: "-inf", or "zero" as in older models
           (with "zero" such an expert can win against a negative biased score)
    limit  "groups" as above; "each": every group gives MoEConfig.top_k / count experts (InternS1-Pro); then `top_k`
           must equal `count`
    """

    count: int
    top_k: int
    score: Literal["max", "top2_sum"] = "max"
    fill: Literal["-inf", "zero"] = "-inf"
    limit: Literal["groups", "each"] = "groups"

    def __post_init__(self) -> None:
        check_int("GroupConfig.count", self.count, 1)
        check_int("GroupConfig.top_k", self.top_k, 1, self.count)
        check_choice("GroupConfig.score", self.score, ("max", "top2_sum"))
        check_choice("GroupConfig.fill", self.fill, ("-inf", "zero"))
        check_choice("GroupConfig.limit", self.limit, ("groups", "each"))
        if self.limit == "each" and self.top_k != self.count:
            raise ValueError(
                f"GroupConfig.top_k={self.top_k} with limit='each': expected count={self.count}: every group is kept"
            )


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The function from logits to expert ids and routing weights; the equations are in `moe_fn.route`.

    scoring, scoring_order   the score function, of all logits ("before_top_k") or of the chosen ones ("after_top_k")
    selection                "top_k": the best scores; "sparsemixer" (Phi-3.5-MoE, top_k = 2); "hash": a table of token
                             ids (DeepSeek-V4)
    correction_bias          `weights.router.correction_bias` is added for the choice only: to "scores" or to "logits"
    renormalize              divide the weights of a token by max((sum |w|^order)^(1/order) + epsilon, minimum)
    routed_scaling_factor    gamma, on the "weights" or on the routed "output"; "output_float16_safe" leaves float16
                             layers with shared experts divided by gamma instead (routed + shared / gamma), which the
                             model compensates
    logit_multiplier         z * multiplier, then softcap * tanh(z / softcap) when logit_softcap is given
    weight_on                the routing weight multiplies the expert's "output", or its "input" (Llama-4)
    capacity                 most slots of an expert in each sequence (the second to last dim of x): first choices of
                             all tokens before second choices, tokens in order; further slots are dropped (id -1;
                             Switch, GShard). None: no limit
    gate_dtype, score_dtype  "float32", or the dtype of the "input"
    gate_input               the input of the gate inside the layer: the "original" x, or the "transformed" one (latent
                             and padded)
    """

    scoring: Scoring = "softmax"
    scoring_order: ScoringOrder = "before_top_k"
    selection: Selection = "top_k"
    correction_bias: CorrectionBias = "none"
    groups: GroupConfig | None = None
    renormalize: bool = True
    renormalize_epsilon: float = 0.0
    renormalize_minimum: float = 0.0
    renormalize_order: float = 1.0
    routed_scaling_factor: float = 1.0
    scale_on: ScaleOn = "weights"
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    sparsemixer_epsilon: float = 0.01
    weight_on: Literal["output", "input"] = "output"
    capacity: int | None = None
    gate_dtype: Precision = "float32"
    score_dtype: Precision = "float32"
    gate_input: Literal["original", "transformed"] = "original"

    def __post_init__(self) -> None:
        check_choice("RouterConfig.scoring", self.scoring, tuple(SCORINGS))
        check_choice("RouterConfig.scoring_order", self.scoring_order, get_args(ScoringOrder))
        check_choice("RouterConfig.selection", self.selection, get_args(Selection))
        check_choice("RouterConfig.correction_bias", self.correction_bias, get_args(CorrectionBias))
        check_bool("RouterConfig.renormalize", self.renormalize)
        check_float("RouterConfig.renormalize_epsilon", self.renormalize_epsilon, minimum=0.0)
        check_float("RouterConfig.renormalize_minimum", self.renormalize_minimum, minimum=0.0)
        check_float("RouterConfig.renormalize_order", self.renormalize_order, minimum=1.0)
        check_float("RouterConfig.routed_scaling_factor", self.routed_scaling_factor)
        check_choice("RouterConfig.scale_on", self.scale_on, get_args(ScaleOn))
        check_float("RouterConfig.logit_multiplier", self.logit_multiplier)
        if self.logit_softcap is not None:
            check_float("RouterConfig.logit_softcap", self.logit_softcap, above=0.0)
        check_float("RouterConfig.sparsemixer_epsilon", self.sparsemixer_epsilon, minimum=0.0)
        check_choice("RouterConfig.weight_on", self.weight_on, ("output", "input"))
        if self.capacity is not None:
            check_int("RouterConfig.capacity", self.capacity, 1)
        check_choice("RouterConfig.gate_dtype", self.gate_dtype, get_args(Precision))
        check_choice("RouterConfig.score_dtype", self.score_dtype, get_args(Precision))
        check_choice("RouterConfig.gate_input", self.gate_input, ("original", "transformed"))
        if not isinstance(self.groups, GroupConfig | None):
            raise ValueError(f"RouterConfig.groups is {self.groups!r:.200}; expected a GroupConfig or None")
        if self.scale_on != "weights" and self.routed_scaling_factor == 0.0:
            raise ValueError(
                "RouterConfig.routed_scaling_factor=0.0 with a scale on the output: expected a nonzero number"
            )
        self._reject_ignored_fields()

    def _reject_ignored_fields(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}

        def only_with(needed: str, holds: bool, *names: str) -> None:
            for name in names:
                if not holds and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"RouterConfig.{name}={getattr(self, name)!r} would have no effect: expected {needed}"
                    )

        only_with(
            "renormalize=True", self.renormalize, "renormalize_epsilon", "renormalize_minimum", "renormalize_order"
        )
        only_with("selection='sparsemixer'", self.selection == "sparsemixer", "sparsemixer_epsilon")
        only_with("selection='top_k'", self.selection == "top_k", "correction_bias", "groups")
        only_with("selection other than 'sparsemixer'", self.selection != "sparsemixer", "scoring", "scoring_order")
        if self.selection == "sparsemixer" and self.renormalize:
            raise ValueError(
                "RouterConfig.renormalize=True with selection='sparsemixer': expected False, because its two weights "
                "come from two softmaxes"
            )
        if self.groups is not None and (self.scoring_order, self.correction_bias) not in _GROUPABLE:
            raise ValueError(
                f"RouterConfig.groups with scoring_order={self.scoring_order!r} and "
                f"correction_bias={self.correction_bias!r}: "
                "expected scoring_order='before_top_k' and correction_bias 'none' or 'scores', because groups are "
                "ranked by scores"
            )


_GROUPABLE = (("before_top_k", "none"), ("before_top_k", "scores"))
