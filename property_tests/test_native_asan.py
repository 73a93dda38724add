"""The native kernels under AddressSanitizer: products and gradients do not read or write past the end of a tensor or
buffer.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from planted.cpp import BUGS
from test_native import RUNNABLE
from tools.cpp_changes import Change, Workshop
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
TESTS = (
    "test_native_backward.test_gradients_of_more_rows_than_a_block_or_a_chunk",
    "test_native_backward.test_gradients_of_every_level",
    "test_native_backward.test_outer_products_of_many_rows",
    "test_native_backward.test_outer_products_of_segments",
    "test_native.test_few_and_many_rows_of_weights_kept_in_out",
    "test_native.test_grouped_products_of_every_level",
    "test_native_router.test_bits_are_those_of_the_stages",
    "test_native_router.test_sizes_at_the_edges_and_rows_of_several_threads",
)
RUN = (
    "import conftest, sys; from pathlib import Path; from tools.cpp_changes import run; "
    "run(Path(sys.argv[1]), sys.argv[2:], print)"
)
OPTIONS = "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1"


def libasan() -> str | None:
    """Returns the compiler's AddressSanitizer library, which must be loaded before Python."""
    if not RUNNABLE or sys.platform != "linux":
        return None
    command = [*cpp_extension.get_cxx_compiler().split(), "-print-file-name=libasan.so"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None
    return found if Path(found).is_absolute() else None


pytestmark = [pytest.mark.thorough, pytest.mark.skipif(libasan() is None, reason="no AddressSanitizer here")]


def sanitised(level: str, change: Change | None, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    with Workshop(level, ("-fsanitize=address",)) as workshop:
        library = workshop.library(change)
        path = f"PYTHONPATH={FOLDER.parent}:{FOLDER}"
        command = [
            "env",
            f"LD_PRELOAD={libasan()}",
            f"ASAN_OPTIONS={OPTIONS}",
            path,
            "OMP_NUM_THREADS=1",
            sys.executable,
            "-c",
            RUN,
        ]
        return subprocess.run([*command, str(library), *tests], capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("level", RUNNABLE)
def test_nothing_is_read_or_written_past_an_end(level: str) -> None:
    done = sanitised(level, None, TESTS)
    assert done.returncode == 0, done.stderr[-5000:]


def test_the_sanitizer_sees_a_buffer_that_is_too_small() -> None:
    (bug,) = [bug for bug in BUGS if "chunks of rows" in bug.what]
    done = sanitised(RUNNABLE[-1], bug.change, TESTS[:1])
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-5000:]
