"""Random problems over the whole config space, all options crossed; each depends on (seed, index) only."""

import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from moe_fn.config import LatentConfig, LoRAConfig, NormsConfig, QuantConfig
from moe_fn.testing import MoEProblem, configs, problems, quants

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LORAS = tuple(
    LoRAConfig(num_adapters=adapters, rank=rank, experts=experts)  # type: ignore[arg-type]
    for adapters, rank, experts in itertools.product((1, 2, 4), (1, 3), ("each", "shared", "outer_shared"))
)
_NORMS = tuple(
    NormsConfig(epsilon=0.01, input=before, gate=gate, output=after)
    for before, gate, after in itertools.product((False, True), repeat=3)
    if before or gate or after
)
_FACTORS = ((2.0**-10, 2.0**6), (2.0**-6, 2.0))  # the largest float16 is 65504
_EVEN = st.sampled_from((2, 4, 8, 20, 40))
_QUANTS = quants()
_PER_SEED = 2**32


@st.composite
def every_problem(draw: DrawFn) -> MoEProblem:
    """Problems of every dtype, with options that `configs()` does not draw: norms, LoRA, codes, a capacity, inputs of
    other magnitudes. Without ranks.

    Logits are on a grid or from an exact gate, so that the choice of experts is exact in every dtype. With bfloat16 and
    float16, gates and scores are in float32, as the choice would be rounded in those dtypes.

    >>> problem_of(0, 4).config.to_dict() == problem_of(0, 5).config.to_dict()
    False
    """
    dtype = draw(
        st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64))
    )
    fixed: dict[str, Any] = {
        "quant": draw(st.one_of(st.none(), st.none(), _QUANTS)),
        "lora": draw(st.sampled_from((None,) * len(_LORAS) + _LORAS)),
        "norms": draw(st.sampled_from((None,) * 2 * len(_NORMS) + _NORMS)),
        "capacity": draw(st.sampled_from((None, None, None, None, 1, 2, 5))),
    }
    if dtype in (torch.bfloat16, torch.float16):
        fixed |= {"gate_dtype": "float32", "score_dtype": "float32"}
    if fixed["norms"] is not None and fixed["norms"].gate:
        fixed["gate_input"] = "original"
    if fixed["quant"] is not None:
        fixed |= draw(_fitting(fixed["quant"]))
    problem = draw(problems(configs(**fixed), dtype=dtype))
    # Scaled inputs of a gate inside the layer would give logits off their grid.
    factor = (
        1.0 if problem.logits is None else draw(st.sampled_from((1.0, 1.0, 1.0, *_FACTORS[dtype == torch.float16])))
    )
    return problem if factor == 1.0 else problem.replace(x=problem.x * factor)


@st.composite
def _fitting(draw: DrawFn, quant: QuantConfig) -> dict[str, Any]:
    """Returns options that codes require: two 4-bit codes in a byte, scales along the inputs, and no chunks where one
    scale is for all rows.
    """
    return {
        "hidden_size": draw(_EVEN),
        "intermediate_size": draw(_EVEN),
        "hidden_padding": draw(st.sampled_from((0, 0, 2))),
        "latent": draw(st.sampled_from((None, None, LatentConfig(size=6, norm_epsilon=0.01)))),
        "weight_layout": "out_in",
    } | ({"chunk_tokens": None} if quant.rounds_by_call else {})


def problem_of(seed: int, index: int) -> MoEProblem:
    """Returns problem `index` of a seed, the same in every process, whatever was drawn before it.

    >>> repr(problem_of(3, 7)) == repr(problem_of(3, 7))
    True
    """
    drawn: list[MoEProblem] = []

    # Hypothesis' first example is the simplest one; the second is random.
    @seeded(seed * _PER_SEED + index)
    @settings(
        max_examples=2, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(every_problem())
    def collect(problem: MoEProblem) -> None:
        drawn.append(problem)

    collect()
    return drawn[-1]
