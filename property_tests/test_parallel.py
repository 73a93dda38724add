"""Sharded layers equal unsharded ones, values and gradients: every dispatch format on meshes of 1, 2 and 4
processes.
"""

import contextlib
import inspect
import queue
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch.distributed as dist
from options import options_of, there_are
from planted.ranks import RANK_BUGS
from ranks.cases import ALL_LAYERS, Which, cases, jobs, worker
from ranks.layers import EXCUSED

from moe_fn import ParallelConfig
from shared_tests.ranks import ranks_context, started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
TIMEOUT_S, WORD_S = 180, 10


def run_world(world: int, folder: Path, which: Which = "cases") -> dict[str, dict[int, str | None]]:
    """Returns errors by case and rank."""
    context = ranks_context()
    results = context.Queue()
    arguments = [(rank, world, str(folder / "store"), results, which) for rank in range(world)]
    found: dict[str, dict[int, str | None]] = {}
    with started(context, worker, arguments, folder) as processes:
        try:
            for _ in range(world * len(jobs(world, which))):
                rank, name, error = next_word(results, processes)
                found.setdefault(name, {})[rank] = error
        except queue.Empty:
            ends = [process.exitcode for process in processes]
            wrong = errors_in(found)
            first = f"{world} ranks ended with {ends}: no word after {len(found)} cases, the last {list(found)[-1:]}"
            pytest.fail("\n".join([first, *wrong[:20]]))
    return found


def errors_in(found: dict[str, dict[int, str | None]]) -> list[str]:
    """Returns the errors with the names of their cases and ranks."""
    return [f"{name}, rank {rank}: {error}" for name, ranks in found.items() for rank, error in ranks.items() if error]


def next_word(results: Any, processes: Any) -> Any:
    """Returns the next result. Raises queue.Empty after TIMEOUT_S, and soon after a rank is dead: errors of the other
    ranks in the remaining cases have no information.
    """
    for _ in range(TIMEOUT_S // WORD_S):
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=WORD_S)
        if any(process.exitcode for process in processes):
            break
    raise queue.Empty


_CROSSED = [pytest.param(world, "crossed", marks=pytest.mark.thorough) for world in (2, 4)]


@pytest.mark.parametrize(("world", "which"), [(1, "cases"), (2, "cases"), (4, "cases"), *_CROSSED])
def test_sharded_equals_unsharded(world: int, which: Which, tmp_path: Path) -> None:
    found = run_world(world, tmp_path, which)
    wrong = errors_in(found)
    assert not wrong, "\n".join(wrong[:20])
    assert len(found) == len(jobs(world, which))


def test_ranks_compute_with_every_option() -> None:
    """Every value of every argument of ParallelConfig.from_mesh is in some case; an argument that a case does
    not give has its default.
    """
    found = [case for world in (1, 2, 4) for case in cases(world)]
    words = inspect.signature(ParallelConfig.from_mesh).parameters
    seen: dict[str, set[Any]] = {word: {words[word].default} - {None, False} for word in words if word != "mesh"}
    for case in found:
        for word, value in (*case.options.items(), *case.mesh):
            seen[word].add(value)
    seen["shared"].add("sharded")  # the default except with sequence_parallel
    kinds = get_type_hints(ParallelConfig.from_mesh)
    for word, values in seen.items():
        parts = (kinds[word], *get_args(kinds[word]))
        assert values and values >= {
            choice for part in parts if get_origin(part) is Literal for choice in get_args(part)
        }, word


def test_ranks_compute_with_every_option_of_the_layer() -> None:
    """Options in EXCUSED are exempt; an excused option that a case computes with must be removed from EXCUSED."""
    layers = {case.layer for world in (1, 2, 4) for case in cases(world)}
    assert layers == set(ALL_LAYERS)
    computed = {option for layer in layers for option in options_of(ALL_LAYERS[layer])}
    missing = {
        option for option in there_are() if option[0].split(".")[0] not in ("ParallelConfig", "RankGroup")
    } - computed
    missing -= {("MoEConfig.parallel", "ParallelConfig")}
    excused = {option for option in missing if option in EXCUSED or option[0] in EXCUSED}
    assert missing == excused
    assert {
        reason for reason in EXCUSED if reason not in missing and reason not in {field for field, _ in missing}
    } == set()


def test_the_law_kills_every_planted_bug(tmp_path: Path) -> None:
    found = run_world(2, tmp_path, "bugs")
    assert set(found) == {bug.what for bug in RANK_BUGS}
    survived = [name for name, ranks in found.items() if not any(ranks.values())]
    assert not survived, survived
