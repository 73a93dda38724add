"""Every option is computed with in a test: the problems of the numerical laws have every value of every
config field.
"""

from typing import Any

import test_around_the_experts
import test_layer
import test_lora
import test_native_backward
import test_quant
import test_route
from hypothesis import HealthCheck, Phase, given, settings
from options import Option, options_of, there_are

from moe_fn.testing import MoEProblem

# Laws that compare the layer and its gradients with the reference; those of one line draw the same problems.
LAWS: tuple[tuple[Any, ...], ...] = (
    (test_layer.test_the_layer_equals_the_reference, test_layer.test_gradients_equal_the_reference),
    (test_lora.test_lora_equals_the_reference, test_lora.test_gradients_reach_a_and_b),
    (test_around_the_experts.test_norms_around_the_layer_equal_the_reference,),
    (test_route.test_a_capacity_keeps_the_first_slots_of_every_expert,),
    (test_native_backward.test_gradients_of_the_layer_equal_the_reference,),
)
# Options that those laws do not draw, and the tests that compute with them.
ELSEWHERE: dict[Option, str] = {
    (
        "NormsConfig.gate",
        True,
    ): "test_around_the_experts: its logits are on no grid, so it is compared with a formula",
    ("MoEConfig.backend", "triton"): "test_triton_layer, where Triton is",
    ("MoEConfig.parallel", "ParallelConfig"): "test_parallel, in processes of their own; it has such a test too",
}
DRAWS = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def compute_with_new_ones(laws: tuple[Any, ...], seen: set[Option]) -> None:
    """Runs laws on problems with an option that is not in `seen` yet, and adds it."""

    @DRAWS
    @given(laws[0].strategies[0])
    def compute(problem: MoEProblem) -> None:
        found = set(options_of(problem.config))
        if not found <= seen:
            for law in laws:
                law.check(problem)
            seen.update(found)

    compute()


def test_every_option_is_computed_with() -> None:
    """Every option is compared with the reference. Few of many drawn problems are computed, and the few
    examples of a law need not have all options.
    """
    seen = {option for quant in test_quant.EVERY_QUANT for option in options_of(quant)} | {
        ("MoEConfig.quant", "QuantConfig")
    }
    for laws in LAWS:
        compute_with_new_ones(laws, seen)
    of_one_rank = {option for option in there_are() if option[0].split(".")[0] not in ("ParallelConfig", "RankGroup")}
    assert of_one_rank - seen == set(ELSEWHERE)
