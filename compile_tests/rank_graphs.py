"""Compiled layers on ranks in real processes (gloo): run by `test_parallel`."""

import dataclasses
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map

import moe_fn
from moe_fn import MoEConfig, MoEWeights, ParallelConfig, SharedExpertsConfig
from moe_fn.testing import assert_matches, weights_for
from shared_tests.collector import collect_less

TOKENS = (5, 0, 3)  # of successive calls on the first rank; other ranks have them in another order
MOST = 6


@dataclass(frozen=True)
class Format:
    """The mesh dimension of the ranks, and the options of from_mesh; asks: whether sizes depend on the data."""

    along: str
    options: dict[str, Any] = field(default_factory=dict)
    asks: bool = False


FORMATS: dict[str, Format] = {
    "replicated over tp": Format("tp", {"dispatch": "replicated"}),
    "replicated over ep": Format("ep", {"dispatch": "replicated"}),
    "replicated over tp, ordered": Format("tp", {"dispatch": "replicated", "ordered_sums": True}),
    "all_gather": Format("ep", {"dispatch": "all_gather", "max_tokens": MOST}),
    "all_gather over dp": Format("dp", {"dispatch": "all_gather", "max_tokens": MOST}),
    "all_gather that asks": Format("ep", {"dispatch": "all_gather"}, asks=True),
    "all_gather of logits": Format("ep", {"dispatch": "all_gather", "gather": "logits", "max_tokens": MOST}),
    "all_to_all": Format("ep", {"dispatch": "all_to_all"}, asks=True),
    "all_to_all by a table": Format("ep", {"dispatch": "all_to_all", "placement": (1, 0, 0, 1, 1, 0)}, asks=True),
    "all_to_all_static": Format("ep", {"dispatch": "all_to_all_static", "max_tokens": MOST}),
    "sequence, all_gather": Format("tp", {"sequence_parallel": True, "dispatch": "all_gather", "max_tokens": MOST}),
    "sequence, all_gather that asks": Format("tp", {"sequence_parallel": True, "dispatch": "all_gather"}, asks=True),
    "sequence, all_to_all": Format("tp", {"sequence_parallel": True, "dispatch": "all_to_all"}, asks=True),
    "sequence, all_to_all_static": Format(
        "tp", {"sequence_parallel": True, "dispatch": "all_to_all_static", "max_tokens": MOST}
    ),
}


def config_of(parallel: ParallelConfig, experts: int = 6, inner: int = 8, **more: Any) -> MoEConfig:
    """Returns the config of a small layer with shared experts."""
    shared = SharedExpertsConfig(intermediate_size=inner)
    sizes = {"num_experts": experts, "top_k": 2, "hidden_size": 8, "intermediate_size": inner, "shared": shared}
    return MoEConfig(**(sizes | more), parallel=parallel)


def leaves_of_rank(config: MoEConfig, dtype: torch.dtype = torch.float32) -> MoEWeights:
    """Returns this rank's weights as leaves that require gradients."""
    full = weights_for(dataclasses.replace(config, parallel=None), seed=1, dtype=dtype)
    own = moe_fn.shard_weights(config, full)
    return tree_map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t, own)  # type: ignore[no-any-return]


def tokens_of(
    config: MoEConfig, count: int, seed: int, dtype: torch.dtype = torch.float32, mark: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns x and logits that require gradients, with a dynamic number of tokens if `mark`."""
    generator = torch.Generator().manual_seed(100 * seed + count)
    x, logits = (torch.randn(count, n, generator=generator).to(dtype) for n in (config.hidden_size, config.num_logits))
    x.requires_grad_(), logits.requires_grad_()
    if mark:
        moe_fn.mark_tokens(x, logits)
    return x, logits


def run(fn: Any, weights: MoEWeights, x: Tensor, logits: Tensor) -> list[Tensor]:
    """Returns the output and every gradient."""
    y = fn(weights, x, logits)
    inputs = [x, logits, *(t for t in tree_leaves(weights) if t.is_floating_point())]
    seed = torch.arange(1, y.numel() + 1, dtype=torch.float32).cos().view_as(y)
    found = torch.autograd.grad(y, inputs, seed.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True))]


def check(name: str, mesh: DeviceMesh, rank: int, fullgraph: bool, backend: str) -> tuple[int, int]:
    """Checks that calls with several numbers of tokens give the results of eager. Returns (graphs, breaks)."""
    form = FORMATS[name]
    parallel = ParallelConfig.from_mesh(mesh, **{form.along: form.along}, **form.options)
    config = config_of(parallel)
    weights = leaves_of_rank(config)
    same = form.along == "tp" or form.options["dispatch"] == "replicated"  # these ranks have the same tokens
    counts = TOKENS if same or rank == 0 else TOKENS[::-1]
    results: list[list[Tensor]] = []

    def layer(weights: MoEWeights, x: Tensor, logits: Tensor) -> Tensor:
        return moe_fn.moe_forward(config, weights, x, logits)

    calls = [(weights, *tokens_of(config, count, 0 if same else rank)) for count in counts]
    wanted = [run(layer, *call) for call in calls]
    found = run_compiled(layer, calls, results, fullgraph, backend)
    for got, want, count in zip(results, wanted, counts, strict=True):
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_matches(one, other, tolerance=1e-5, scale=0.1, name=f"{name}, {count} tokens, result {i}")
    return found


def run_compiled(
    layer: Any, calls: list[Any], results: list[list[Tensor]], fullgraph: bool, backend: str
) -> tuple[int, int]:
    """Runs compiled calls, forward and backward, and appends their results to `results`. Returns (graphs, breaks)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=fullgraph)
    results += [run(compiled, *call) for call in calls]
    return counter.frame_count, sum(torch._dynamo.utils.counters["graph_break"].values())


# Tested elsewhere: their graphs in test_plain_compile_breaks_nowhere and with 64 ranks, their eager results in
# property_tests/test_parallel.py.
TRACED_ALONE = (
    "all_gather over dp", "all_to_all by a table", "all_gather of logits", "replicated over tp", "all_gather that asks",
    "sequence, all_gather", "sequence, all_gather that asks", "sequence, all_to_all_static",
)  # fmt: skip
Job = tuple[str, bool, str]  # format, fullgraph, backend
MORE_JOBS: tuple[Job, ...] = tuple((name, True, "aot_eager") for name in FORMATS if name not in TRACED_ALONE)
# Every collective: sums in an order, gathered tokens, exchanges with sizes from the data (one op, also under plain
# compile) and in equal parts (by Inductor too), and tokens that ranks cut between them.
JOBS: tuple[Job, ...] = (
    ("replicated over tp, ordered", True, "aot_eager"),
    ("all_gather", True, "aot_eager"),
    ("all_to_all by a table", False, "aot_eager"),
    ("all_to_all_static", True, "inductor"),
    ("sequence, all_to_all", True, "aot_eager"),
)
ALL_JOBS = (*JOBS, *(job for job in (*MORE_JOBS, ("all_gather that asks", False, "aot_eager")) if job not in JOBS))


def worker(rank: int, world: int, store: str, jobs: tuple[Job, ...], results: Any) -> None:
    """Runs jobs on one rank, in order, and puts (rank, job, (graphs, breaks) or an error) into the queue."""
    collect_less()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    meshes = {name: init_device_mesh("cpu", (world,), mesh_dim_names=(name,)) for name in ("tp", "ep", "dp")}
    for job in jobs:
        try:
            results.put((rank, job, check(job[0], meshes[FORMATS[job[0]].along], rank, *job[1:])))
        except Exception as error:
            results.put((rank, job, f"{type(error).__name__}: {str(error)[:800]}"))
    dist.destroy_process_group()
