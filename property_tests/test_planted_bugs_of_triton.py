"""Every bug planted in the Triton kernels is detected by the test that it names."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted.triton import BUGS, TritonBug
from tools.copied_tree import copied_tree, verdict_of

LIMIT_S = 900


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = copied_tree(tmp_path_factory.mktemp("triton"))
    tests = tuple(sorted({f"property_tests/test_triton_{bug.test}" for bug in BUGS}))
    assert verdict_of(made, tests, LIMIT_S) == ("survived", "")
    yield made


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_the_place_of_the_bug_is_there(bug: TritonBug) -> None:
    compile(bug.source, bug.path, "exec")


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_the_test_kills_the_bug(tree: Path, bug: TritonBug) -> None:
    path = tree / bug.path
    before = path.read_text()
    path.write_text(bug.source)
    try:
        verdict, by = verdict_of(tree, (f"property_tests/test_triton_{bug.test}",), LIMIT_S)
    finally:
        path.write_text(before)
    assert verdict == "killed" and bug.test.partition("::")[2] in by, by
