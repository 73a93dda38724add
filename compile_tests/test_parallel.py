"""A layer sharded over ranks is one graph on each rank, with the results of eager mode.

Results are of two processes (gloo); graphs are also of 64 ranks of torch's fake process group, which sends nothing.
"""

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx

from compile_tests.fake_ranks import Echo, collectives_in, fake_ranks, id_of, layer_of, parallel_of
from compile_tests.graphs import graphs_of, ops
from compile_tests.rank_graphs import ALL_JOBS, FORMATS, JOBS, MOST, Job, config_of, leaves_of_rank, tokens_of, worker
from shared_tests.ranks import started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
TIMEOUT_S = 120
RANKS = 64


@pytest.mark.parametrize("jobs", [JOBS, pytest.param(ALL_JOBS, marks=pytest.mark.thorough)], ids=["each kind", "all"])
def test_two_processes_make_one_graph_each_with_the_numbers_of_eager(jobs: tuple[Job, ...], tmp_path: Path) -> None:
    context: Any = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, 2, str(tmp_path / "store"), jobs, results) for rank in range(2)]
    found: dict[Any, Any] = {}
    with started(context, worker, arguments, tmp_path):
        try:
            for _ in range(2 * len(jobs)):
                rank, job, result = results.get(timeout=TIMEOUT_S)
                found[(job, rank)] = result
        except queue.Empty:
            pytest.fail(f"no result for {TIMEOUT_S} s, after {len(found)} jobs")
    assert {key: result for key, result in found.items() if result != (1, 0)} == {}


@pytest.mark.parametrize("name", FORMATS)
def test_plain_compile_breaks_nowhere(name: str) -> None:
    """Dynamo traces without breaks; the graphs are not run, as the fake group sends no sizes."""
    form, graphs = FORMATS[name], []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return lambda *args: (torch.zeros(5, 8),)

    with fake_ranks(2, rank=1):
        config = config_of(parallel_of({form.along: 2}, form.options))
        torch._dynamo.utils.counters.clear()
        torch.compile(layer_of(config), backend=backend)(leaves_of_rank(config), *tokens_of(config, 5, seed=0))
    assert (len(graphs), dict(torch._dynamo.utils.counters["graph_break"])) == (1, {})
    assert ("moe_forward" in ops(graphs)) == form.asks  # one op, in which values may not be read


ON_64: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    ({"ep": 64}, {"dispatch": "all_gather", "max_tokens": MOST, "placement": "round_robin"}),
    ({"ep": 64}, {"dispatch": "all_to_all"}),
    ({"ep": 64}, {"dispatch": "all_to_all_static", "max_tokens": MOST}),
    ({"ep": 8, "tp": 8}, {"dispatch": "replicated"}),
    ({"ep": 8, "tp": 8}, {"dispatch": "all_to_all"}),
    ({"ep": 8, "tp": 8}, {"sequence_parallel": True, "dispatch": "all_to_all_static", "max_tokens": MOST}),
    ({"dp": 8, "ep": 8}, {"dispatch": "all_gather", "gather": "logits", "max_tokens": MOST}),
    (
        {"dp": 8, "ep": 8},
        {"dispatch": "all_to_all_static", "max_tokens": MOST, "placement": tuple(e % 8 for e in range(128))},
    ),
)


# With sizes that depend on data, in equal parts with ranks along two dimensions, and gathered over two.
ON_64_OFTEN = (1, 5, 6)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.thorough] * (number not in ON_64_OFTEN), id=id_of(case))
        for number, case in enumerate(ON_64)
    ],
)
def test_64_ranks_trace_to_one_graph(case: Any) -> None:
    with fake_ranks(RANKS, rank=37):
        config = config_of(parallel_of(*case), experts=128, inner=64)
        graphs = graphs_of(
            layer_of(config), (leaves_of_rank(config), *tokens_of(config, 5, seed=0)), fullgraph=True, interpreter=Echo
        )
    assert [len(graphs.dynamo), len(graphs.forward), len(graphs.backward)] == [1, 1, 1]
    assert collectives_in(graphs.forward[0])
