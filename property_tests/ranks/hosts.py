"""A model of two layers wrapped for data parallelism, compared with the same model unwrapped: run by `test_host_ranks`
in real processes (gloo).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import moe_fn
from moe_fn import MoEConfig, MoEWeights, RouterWeights
from moe_fn.testing import assert_matches

WORLD = 2
CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=16, intermediate_size=12)


class Layer(nn.Module):
    """x + the layer; with `again`, activations are recomputed in backward."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.gate = nn.Parameter(torch.randn(8, 16) / 4)
        self.gate_up = nn.Parameter(torch.randn(8, 24, 16) / 4)
        self.down = nn.Parameter(torch.randn(8, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.once, x, use_reentrant=False) if self.again else self.once(x)  # type: ignore[no-any-return]

    def once(self, x: Tensor) -> Tensor:
        weights = MoEWeights(gate_up=self.gate_up, down=self.down, router=RouterWeights(gate=self.gate))
        return x + moe_fn.moe_forward(CONFIG, weights, x)


def model_of_layers(again: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(again), Layer(again))


def data_parallel(model: nn.Sequential) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Sequential, **options: Any) -> nn.Module:
    for layer in model:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def compiled_inside(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def compiled_outside(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)


@dataclass(frozen=True)
class Host:
    """How the model is wrapped, and the tolerance of the comparison with the unwrapped model."""

    wrap: Callable[[nn.Sequential], nn.Module]
    again: bool = False
    tolerance: float | None = 1e-5


HOSTS: dict[str, Host] = {
    "DDP": Host(data_parallel),
    "DDP, checkpointed": Host(data_parallel, again=True),
    "compiled DDP": Host(lambda model: compiled_outside(data_parallel(model))),
    "FSDP2": Host(sharded),
    "FSDP2, checkpointed": Host(sharded, again=True),
    "FSDP2 of compiled layers": Host(lambda model: sharded(compiled_inside(model))),
    # near-ties may go to other experts
    "FSDP2 in bfloat16": Host(lambda model: sharded(model, mp_policy=HALF), tolerance=None),
}


def inputs() -> list[Tensor]:
    return [torch.randn(11, 16, generator=torch.Generator().manual_seed(rank)) for rank in range(WORLD)]


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # type: ignore[no-any-return]


def check(host: Host, rank: int) -> None:
    alone, xs = model_of_layers(), inputs()
    ys = [alone(x) for x in xs]
    torch.stack([y.square().mean() for y in ys]).mean().backward()
    model = model_of_layers(host.again)
    parameters = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(parameters, alone.parameters(), strict=True))
    wrapped = host.wrap(model)
    for _ in range(2):  # the second step runs with filled caches
        y = wrapped(xs[rank])
        wrapped.zero_grad()
        y.square().mean().backward()
    found = [whole(p.grad) for p in model.parameters()]
    assert len(found) == len(parameters) and all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in found)
    if host.tolerance is None:
        assert ((y - ys[rank]).square().mean(-1).sqrt() < 0.05).float().mean() > 0.7  # of the tokens
        return
    assert_matches(y, ys[rank], tolerance=host.tolerance)
    for gradient, parameter in zip(found, alone.parameters(), strict=True):
        assert_matches(gradient, parameter.grad, tolerance=host.tolerance)


def rank_of_hosts(rank: int, store: str, pipe: Any) -> None:
    """Sends the errors of each host through the pipe."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found: dict[str, str] = {}
    for name, host in HOSTS.items():
        try:
            check(host, rank)
        except Exception as error:  # so that the other rank does not wait for this one
            found[name] = f"{type(error).__name__}: {error}"[:2000]
        torch._dynamo.reset()
    pipe.send(found)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
