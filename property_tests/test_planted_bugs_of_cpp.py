"""Every bug planted in the C++ kernels is detected by the test that it names."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from planted import cpp, cpp_router, tiles
from planted.cpp import CppBug
from test_native_amx import COMPILED
from tools.cpp_changes import Workshop, judged

from moe_fn.kernels.native import library as native

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(native.active().problem is not None, reason="no native kernels here"),
]
ALL = [bug for bug in (*cpp.BUGS, *cpp_router.BUGS, *tiles.BUGS) if COMPILED or bug.level != "amx"]


@pytest.fixture(scope="module")
def workshop_of() -> Iterator[Callable[[str], Workshop]]:
    made: dict[str, Workshop] = {}
    with ExitStack() as open_ones:

        def workshop(level: str) -> Workshop:
            if level not in made:
                made[level] = open_ones.enter_context(Workshop(level))
                tests = sorted({bug.test for bug in ALL if bug.level == level})
                assert judged(made[level].library(None), tests) == ("survived", "")
            return made[level]

        yield workshop


@pytest.mark.parametrize("bug", ALL, ids=lambda bug: f"{bug.test.partition('.')[2]}: {bug.what}")
def test_the_test_kills_the_bug(workshop_of: Callable[[str], Workshop], bug: CppBug) -> None:
    library = workshop_of(bug.level).library(bug.change)
    verdict, by = judged(library, [bug.test])
    shutil.rmtree(library.parent)
    assert verdict == "killed" and "TypeError" not in by and "loading" not in by, by
