"""The fixed cases of these tests: four layers, each in the four forms that a layer has in a graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import moe_fn
from moe_fn import (
    ExpertNormConfig,
    GroupConfig,
    LatentConfig,
    MoEConfig,
    MoEWeights,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.testing import weights_for

TORCH_2_11 = torch.__version__.startswith("2.11.")
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 16, 12

DEEPSEEK_ROUTER = RouterConfig(
    scoring="sigmoid",
    correction_bias="scores",
    groups=GroupConfig(count=4, top_k=2, score="top2_sum"),
    renormalize_epsilon=1e-20,
    routed_scaling_factor=2.5,
    scale_on="output",
)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "deepseek": {"router": DEEPSEEK_ROUTER, "shared": SharedExpertsConfig(intermediate_size=6, count=2)},
    "gpt_oss": {
        "router": RouterConfig(scoring_order="after_top_k", renormalize=False),
        "activation": "swigluoai",
        "gate_up_layout": "interleaved",
        "weight_layout": "in_out",
    },
    "everything": {
        "top_k": 4,
        "router": RouterConfig(
            scoring="sqrtsoftplus", correction_bias="logits", logit_softcap=5.0, routed_scaling_factor=1.5
        ),
        "latent": LatentConfig(size=10),
        "hidden_padding": 2,
        "expert_norm": ExpertNormConfig(),
        "zero_experts": ZeroExpertsConfig(count=2, kind="constant"),
        "shared": SharedExpertsConfig(intermediate_size=6, gate="sigmoid", combine="average"),
    },
}
GATE_INSIDE = {"gpt_oss", "everything"}
MASKED = {"everything"}
CHUNK = 16
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "opaque": {"opaque": True},
    "chunked": {"chunk_tokens": CHUNK},
    "opaque_chunked": {"opaque": True, "chunk_tokens": CHUNK},
}


@dataclass(frozen=True)
class Case:
    """One layer in one form. `args` are those of `layer`: (weights, x, logits or None, token_mask or None)."""

    recipe: str
    form: str = "plain"
    backend: Any = "auto"

    @property
    def config(self) -> MoEConfig:
        sizes = {"num_experts": NUM_EXPERTS, "top_k": 2, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
        return MoEConfig(**(sizes | RECIPES[self.recipe] | FORMS[self.form]), backend=self.backend)

    @property
    def layer(self) -> Callable[..., Tensor]:
        config = self.config

        def layer(
            weights: MoEWeights, x: Tensor, logits: Tensor | None = None, token_mask: Tensor | None = None
        ) -> Tensor:
            return moe_fn.moe_forward(config, weights, x, logits, token_mask=token_mask)

        return layer

    def weights(self, dtype: torch.dtype = torch.float32) -> MoEWeights:
        rich = self.recipe != "default"
        return weights_for(self.config, seed=1, dtype=dtype, bias=rich, scales=rich)

    def args(self, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
        return self.weights(dtype), *self.token_args(tokens, dtype, seed)

    def token_args(self, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
        """(x, logits or None, token_mask or None)."""
        generator = torch.Generator().manual_seed(1000 * seed + tokens)
        x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        logits = torch.randn(tokens, self.config.num_logits, generator=generator, dtype=torch.float64).to(dtype)
        mask = torch.rand(tokens, generator=generator) > 0.2
        return x, None if self.recipe in GATE_INSIDE else logits, mask if self.recipe in MASKED else None

    def __str__(self) -> str:
        return f"{self.recipe}-{self.form}"


def every_case(recipes: Sequence[str] = tuple(RECIPES), forms: Sequence[str] = tuple(FORMS)) -> list[Case]:
    return [Case(recipe, form) for recipe in recipes for form in forms]


# One case of each kind: all forms of the layer without options, every recipe by stages, and all optional tensors as
# inputs of the one op of the opaque form. The other cases are combinations of these.
KINDS = (*(("default", form) for form in FORMS), *((recipe, "plain") for recipe in RECIPES), ("everything", "opaque"))
# The fewest cases that have both paths and every option, for tests that take a second or more for a case.
IN_STAGES_AND_IN_ONE_OP = (("default", "plain"), ("default", "opaque_chunked"), ("everything", "plain"))
EVERY = tuple((recipe, form) for recipe in RECIPES for form in FORMS)  # for tests that take milliseconds


def cases(
    recipes: Sequence[str] = tuple(RECIPES),
    forms: Sequence[str] = tuple(FORMS),
    often: Sequence[tuple[str, str]] = KINDS,
) -> pytest.MarkDecorator:
    """Parametrizes a test over layers and forms, as its argument `case`.

    often: (recipe, form) of the cases that `make test` runs; the others are thorough.
    """
    found = [
        pytest.param(case, marks=[pytest.mark.thorough] * ((case.recipe, case.form) not in often), id=str(case))
        for case in every_case(recipes, forms)
    ]
    return pytest.mark.parametrize("case", found)


def as_leaves(args: Any) -> Any:
    """Returns copies of tensors; floating-point ones require gradients."""
    return tree_map(
        lambda t: t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t, args
    )
