"""A campaign: thousands of random problems over the whole config space, each held to a bound of its own rounding error.

    PYTHONPATH=property_tests python -m campaign run --problems 20000 --workers 2

drawing     problems as a function of (seed, index); laws: other ways to ask for the same numbers; checking: one line a
            problem

The bounds are `moe_fn.testing.error_bound`.
"""

from campaign.drawing import every_problem, problem_of

__all__ = ["every_problem", "problem_of"]
