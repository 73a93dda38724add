"""Every bug planted in the C++ kernels is detected by the test that it names."""

import shutil
from collections.abc import Iterator

import pytest
from planted.cpp import BUGS, CppBug
from tools.cpp_changes import Workshop, judged

from moe_fn.kernels.native import library as native

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(native.active().problem is not None, reason="no native kernels here"),
]


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    with Workshop() as made:
        assert judged(made.library(None), sorted({bug.test for bug in BUGS})) == ("survived", "")
        yield made


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.test.partition('.')[2]}: {bug.what}")
def test_the_test_kills_the_bug(workshop: Workshop, bug: CppBug) -> None:
    library = workshop.library(bug.change)
    verdict, by = judged(library, [bug.test])
    shutil.rmtree(library.parent)
    assert verdict == "killed" and "TypeError" not in by and "loading" not in by, by
