"""torch's compile caches: a second process finds the graphs that the first one compiled, with any op of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile_tests.cached_calls import NAMES
from moe_fn.torch_compat import traces_switching_autocast

QUICK = ("autocast chunked marked masked given backward",)


def counts_of_a_process(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)}  # noqa: TID251
    command = [sys.executable, "-m", "compile_tests.cached_calls", *names]
    run = subprocess.run(
        command, env=variables, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=550
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, int]] = json.loads(run.stdout.splitlines()[-1])
    return found


def assert_second_process_hits(folder: Path, names: tuple[str, ...]) -> None:
    if not traces_switching_autocast():  # in torch 2.11 autocast disables AOTAutograd's cache
        names = tuple(name.removeprefix("autocast ") for name in names)
    first, second = (counts_of_a_process(folder, names) for _ in range(2))
    for name in names:
        assert not [key for key in first[name] if "bypass" in key], (name, first[name])
        assert set(second[name]) == {"autograd_cache_hit", "fxgraph_cache_hit"}, (name, second[name])


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path: Path) -> None:
    assert_second_process_hits(tmp_path, QUICK)


@pytest.mark.thorough
def test_a_second_process_finds_every_kind_of_call(tmp_path: Path) -> None:
    assert_second_process_hits(tmp_path, tuple(name for name in NAMES if name not in QUICK))
