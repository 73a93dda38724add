"""Testing tools for MoE layers: Hypothesis strategies, tolerances by dtype, error bounds, checks of compiled graphs.

configs, problems, routings, quants   Hypothesis strategies over every option of the layer
weights_for                           random weights for a config
assert_matches, relative_rms          comparison by relative root-mean-square error, with a tolerance by dtype
error_bound                           rounding-error bound of a layer for one problem, by running error analysis
assert_one_graph, count_graphs        check that torch.compile makes one graph without breaks; counts of graphs
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
