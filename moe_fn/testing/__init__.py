"""Tools to test a layer with: problems drawn by Hypothesis, one table of tolerances, and a check that a function is one
graph.

configs, problems, routings, quants   what to try: Hypothesis strategies over every option of the layer
weights_for                      random weights that fit a config
assert_matches, relative_rms     whether numbers are right: relative root-mean-square error, by dtype
error_bound                      how far from float64 a right layer can be, for one problem, by running error analysis
assert_one_graph, count_graphs   whether torch.compile makes one graph of it, without breaks
"""

try:
    import hypothesis as _hypothesis
except ModuleNotFoundError as error:
    raise ImportError(
        "moe_fn.testing needs hypothesis, which is an optional extra: pip install moe_fn[testing]"
    ) from error

from moe_fn.testing.bounds import error_bound
from moe_fn.testing.config_strategies import configs
from moe_fn.testing.graphs import Counts, assert_one_graph, count_graphs
from moe_fn.testing.matching import TOLERANCES, assert_matches, relative_rms
from moe_fn.testing.problem import MoEProblem
from moe_fn.testing.quant_strategies import quants
from moe_fn.testing.strategies import problems, routings
from moe_fn.testing.weights import weights_for

del _hypothesis

__all__ = [
    "TOLERANCES", "Counts", "MoEProblem", "assert_matches", "assert_one_graph", "configs", "count_graphs",
    "error_bound", "problems",
    "quants", "relative_rms", "routings", "weights_for",
]  # fmt: skip
