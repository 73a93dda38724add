"""Faults of one of three ranks, and the errors that the others must raise: run by `test_faults` in real processes
(gloo).
"""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moe_fn
from moe_fn import MoEConfig, MoEWeights, ParallelConfig, RankGroup
from moe_fn.ops import collectives
from moe_fn.parallel import check_ranks_agree
from moe_fn.testing import weights_for

WORLD, BAD = 3, 2  # the number of ranks, and the rank with the fault
CHECK_S, GROUP_S = 1.5, 3.0  # timeouts of check_ranks_agree and of the process group
BASE = MoEConfig(num_experts=6, top_k=2, hidden_size=8, intermediate_size=8)


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(*_: Any) -> Any:
    time.sleep(3600)


@dataclass(frozen=True)
class Fault:
    """What the bad rank does, and the text of the other ranks' errors, which must come within `seconds`."""

    words: str
    kind: str = "ValueError"
    seconds: float = CHECK_S
    before_group: Callable[..., Any] | None = None
    before_check: Callable[..., Any] | None = None
    in_forward: Callable[..., Any] | None = None
    in_backward: Callable[..., Any] | None = None
    config: Callable[[MoEConfig], MoEConfig] = lambda config: config
    weights: Callable[[MoEWeights], MoEWeights] = lambda weights: weights
    dispatch: str = "all_to_all"
    max_tokens: int | None = None
    tokens: int = 4
    checks: int = 1  # number of checks on the good ranks


def changed(**changes: Any) -> Callable[[MoEConfig], MoEConfig]:
    return lambda config: dataclasses.replace(config, **changes)


def in_parallel(**changes: Any) -> Callable[[MoEConfig], MoEConfig]:
    return lambda config: dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **changes))


_TORCH = r"Connection closed by peer|Connection reset by peer|Broken pipe|[Tt]imed out|Timeout"
MISSING = r"rank 2 did not call within 1.5 s, ranks 0, 1 did"
FAULTS: dict[str, Fault] = {
    "nothing": Fault("^$", "", 20.0),
    "dies before set-up": Fault(_TORCH + "|timeout|Connect", "RuntimeError", GROUP_S, before_group=die),
    "dies before the check": Fault(MISSING, before_check=die),
    "hangs before the check": Fault(MISSING, before_check=hang),
    "dies in forward": Fault(_TORCH, "RuntimeError", GROUP_S, in_forward=die),
    "dies in backward": Fault(_TORCH, "RuntimeError", GROUP_S, in_backward=die),
    "hangs in forward": Fault(_TORCH, "RuntimeError", GROUP_S, in_forward=hang),
    "hangs in backward": Fault(_TORCH, "RuntimeError", GROUP_S, in_backward=hang),
    "dies in forward, static blocks": Fault(
        _TORCH, "RuntimeError", GROUP_S, in_forward=die, dispatch="all_to_all_static", max_tokens=4
    ),
    "hangs in forward, replicated": Fault(_TORCH, "RuntimeError", GROUP_S, in_forward=hang, dispatch="replicated"),
    "more tokens than max_tokens": Fault(
        _TORCH, "RuntimeError", GROUP_S, tokens=5, dispatch="all_to_all_static", max_tokens=4
    ),
    "more tokens than max_tokens, gathered": Fault(
        _TORCH, "RuntimeError", GROUP_S, tokens=5, dispatch="all_gather", max_tokens=4
    ),
    "another expert count": Fault(r"num_experts is 6 on ranks 0, 1 and 9 on rank 2", config=changed(num_experts=9)),
    "another top_k": Fault(r"top_k is 2 on ranks 0, 1 and 1 on rank 2", config=changed(top_k=1)),
    "another router": Fault(
        r"router.scoring is 'softmax' on ranks 0, 1 and 'sigmoid' on rank 2",
        config=changed(router=moe_fn.RouterConfig(scoring="sigmoid")),
    ),
    "another format": Fault(
        r"parallel.dispatch is 'all_to_all' on ranks 0, 1 and 'all_gather' on rank 2",
        config=in_parallel(dispatch="all_gather"),
    ),
    "another placement": Fault(
        r"parallel.placement is 'linear' on ranks 0, 1 and 'round_robin' on rank 2",
        config=in_parallel(placement="round_robin"),
    ),
    "another max_tokens": Fault(
        r"parallel.max_tokens is 4 on ranks 0, 1 and 5 on rank 2",
        config=in_parallel(max_tokens=5),
        dispatch="all_to_all_static",
        max_tokens=4,
    ),
    "sums in another order": Fault(
        r"parallel.ep.ordered is False on ranks 0, 1 and True on rank 2",
        config=in_parallel(ep=RankGroup(name="0", size=3, rank=2, ordered=True)),
    ),
    "no parallel": Fault(r"parallel is not there on ranks 0, 1 and None on rank 2", config=changed(parallel=None)),
    "a config of another run": Fault(
        r"rank 2: ParallelConfig.ep is a group named '17', which torch.distributed does not have",
        config=in_parallel(ep=RankGroup(name="17", size=3, rank=2)),
    ),
    "the config of another rank": Fault(
        r"rank 2: ParallelConfig.ep has rank 1 of 3, and torch.distributed's group '0' has rank 2 of 3",
        config=in_parallel(ep=RankGroup(name="0", size=3, rank=1)),
    ),
    "weights of too few experts": Fault(
        r"rank 2: weights.gate_up is \(1, 16, 8\); expected",
        weights=lambda w: dataclasses.replace(w, gate_up=w.gate_up[:1]),
    ),
    "weights of another dtype": Fault(
        r"dtype of weights.down is 'torch.float32' on ranks 0, 1 and 'torch.bfloat16' on rank 2",
        weights=lambda w: dataclasses.replace(w, gate_up=w.gate_up.bfloat16(), down=w.down.bfloat16()),
    ),
    "no weights": Fault(
        r"weights.down is 'torch.float32' on ranks 0, 1 and not there on rank 2", weights=lambda w: None
    ),  # type: ignore[arg-type, return-value]
    "checks less often": Fault(MISSING, checks=2),
}


def layer(fault: Fault, bad: bool) -> None:
    """Runs set-up, check, forward and backward on one rank."""
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",))
    parallel = ParallelConfig.from_mesh(mesh, ep="ep", dispatch=fault.dispatch, max_tokens=fault.max_tokens)  # type: ignore[arg-type]
    config = dataclasses.replace(BASE, parallel=parallel)
    weights = moe_fn.shard_weights(config, weights_for(BASE, seed=3))
    if bad and fault.before_check:
        fault.before_check()
    for _ in range(1 if bad else fault.checks):
        check_ranks_agree(
            fault.config(config) if bad else config,
            fault.weights(weights) if bad else weights,
            timeout_s=CHECK_S if fault.kind else 20,
        )
    if bad and fault.in_forward:
        collectives.exchange_ranks = collectives.start_sum = fault.in_forward  # after tokens were sent
    x = torch.randn(fault.tokens if bad else 4, 8, requires_grad=True)
    y: Tensor = moe_fn.moe_forward(config, weights, x, torch.randn(x.shape[0], 6))
    if bad and fault.in_backward:
        y.register_hook(fault.in_backward)
    (y * y).sum().backward()


def rank_of_fault(rank: int, name: str, store: str, answer: Any) -> None:
    """Runs one rank of one fault, and sends (type of the error, its message, seconds) through the pipe."""
    torch.set_num_threads(1)
    fault, start = FAULTS[name], time.monotonic()
    try:
        if rank == BAD and fault.before_group:
            fault.before_group()
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=GROUP_S)
        )
        start = time.monotonic()
        layer(fault, rank == BAD)
        answer.send(("", "", time.monotonic() - start))
    except Exception as error:
        answer.send((type(error).__name__, str(error), time.monotonic() - start))
