"""Profiles of Hypothesis, and a time limit for each test.

ci        the same 45 examples every time (the default)
dev       new examples every time, and failures are stored; deep: the same with 5000 examples
unshrunk  `ci` without shrinking, where only the verdict counts; mutants: the same with 25 examples
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from shared_tests.collector import collect_less
from shared_tests.interpreter import set_up_once

# Set before Triton is imported, so that its kernels run in the interpreter on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # noqa: TID251

# Files that import mutmut, which `make mutants` installs.
_WITH_MUTMUT = ("areas", "copied", "forked", "judged", "made", "report", "triton")
collect_ignore = [] if importlib.util.find_spec("mutmut") else [f"tools/mutants/{name}.py" for name in _WITH_MUTMUT]

_QUIET = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True, max_examples=45, suppress_health_check=_QUIET
)
settings.register_profile("dev", deadline=None, max_examples=100, suppress_health_check=_QUIET)
settings.register_profile("deep", deadline=None, max_examples=5000, suppress_health_check=_QUIET)
settings.register_profile(
    "unshrunk", parent=settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
)
settings.register_profile("mutants", parent=settings.get_profile("unshrunk"), max_examples=25)
settings.load_profile("ci")
torch.set_num_threads(1)  # problems are tiny; xdist runs one process a core


@pytest.fixture(autouse=True)
def _limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Limits the CPU time of a test, as a broken kernel may loop forever in Triton's interpreter.

    The limit is ten times the time of the slowest test of Triton, and larger for thorough tests.
    """
    # imported here, after the variable of Triton's interpreter is set
    from moe_fn.testing.limits import at_most_cpu_seconds

    seconds = 1800 if request.node.get_closest_marker("thorough") or "triton" not in request.node.nodeid else 180
    with at_most_cpu_seconds(seconds, request.node.nodeid):
        yield


def pytest_collection_finish() -> None:
    set_up_once()
    collect_less()
