"""Empty compile caches before each test, and one thread, as problems are tiny and tests run in parallel."""

import os
from collections.abc import Iterator

import pytest
import torch

# Set before Triton is imported, so that its kernels run in the interpreter on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # noqa: TID251

import torch._dynamo
import torch._inductor.config

from shared_tests.collector import collect_less
from shared_tests.interpreter import set_up_once

torch.set_num_threads(1)
# Starting a pool of compiler processes takes longer than compiling these graphs.
torch._inductor.config.compile_threads = 1


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    set_up_once()
    collect_less()
