"""A campaign: thousands of random problems over the whole config space, each compared with its own error bound.

    PYTHONPATH=property_tests python -m campaign run --problems 20000 --workers 2

drawing     problems as a function of (seed, index)
laws        other calls that must give the same output
checking    checks one problem and makes its line of results

The bounds are computed by `moe_fn.testing.error_bound`.
"""

from campaign.drawing import every_problem, problem_of

__all__ = ["every_problem", "problem_of"]
