"""Caches of functions that read the tables of options, for tests that add a row to a table or remove one."""

from moe_fn.config import config_of_json
from moe_fn.config.quant import quant_of_json
from moe_fn.fused.schema import _config_of
from moe_fn.kernels import arguments
from moe_fn.kernels.native import support as native
from moe_fn.kernels.torch import support as in_torch
from moe_fn.kernels.triton import support as triton
from moe_fn.testing.config_strategies import _activations

CACHED = (
    _activations, config_of_json, quant_of_json, _config_of, arguments._activation, in_torch.quant_problem,
    native._experts_problem, native._quant_problem, native._router_problem, triton._experts_problem,
    triton._router_problem, triton.problem_on, triton.decodes,
)  # fmt: skip


def clear_caches() -> None:
    """Clears the caches, so that none has a result of another table."""
    for function in CACHED:
        function.cache_clear()
