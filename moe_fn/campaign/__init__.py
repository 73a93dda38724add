"""A campaign: thousands of random problems over the whole config space, each held to a bound of its own rounding error.

    python -m moe_fn.campaign run --problems 20000 --workers 2

bounds      error_bound: how far from float64 a right layer can be, for one problem, by running error analysis
drawing     problems as a function of (seed, index); laws: other ways to ask for the same numbers; checking: one line a problem
"""

from moe_fn.campaign.bounds import Bound, error_bound
from moe_fn.campaign.drawing import every_problem, problem_of

__all__ = ["Bound", "error_bound", "every_problem", "problem_of"]
