"""Each test starts with empty compile caches in memory; one thread, for the problems are tiny and tests run side by
side.
"""

import os
from collections.abc import Iterator

import pytest
import torch

# before anybody imports Triton: its kernels are then the interpreter's, and run on the CPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # noqa: TID251

import torch._dynamo
import torch._inductor.config

from shared_tests.collector import collect_less
from shared_tests.interpreter import set_up_once

torch.set_num_threads(1)
# a pool of compiler processes takes longer to start than these graphs to compile
torch._inductor.config.compile_threads = 1


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A broken kernel loops for ever in Triton's interpreter; ten times what its slowest test takes, and thorough ones
    take more.
    """
    # not above: nothing may be imported before Triton is told to interpret
    from moe_fn.testing.limits import at_most_cpu_seconds

    seconds = 1800 if request.node.get_closest_marker("thorough") or "triton" not in request.node.nodeid else 180
    with at_most_cpu_seconds(seconds, request.node.nodeid):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    set_up_once()
    collect_less()
