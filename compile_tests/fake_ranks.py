"""Graphs of one rank in torch's fake process group, in which other ranks do not exist."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh

import moe_fn
from compile_tests.graphs import name_of
from moe_fn import MoEConfig, ParallelConfig

COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


class Echo(fx.Interpreter):
    """Runs a graph as if all ranks had sent the tensors of this one; the fake process group does not write results."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops._c10d_functional.all_to_all_single.default:
            x, received, sent, _ = args
            return x.clone() if received == sent else x.new_zeros(sum(received), *x.shape[1:])
        if target is torch.ops._c10d_functional.all_reduce.default:
            return args[0].clone()
        return super().call_function(target, args, kwargs)


@contextmanager
def fake_ranks(world: int, rank: int) -> Iterator[None]:
    """A context with a fake process group of `world` ranks, of which only this process exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallel_of(mesh_sizes: dict[str, int], options: dict[str, Any]) -> ParallelConfig:
    mesh = init_device_mesh("cpu", tuple(mesh_sizes.values()), mesh_dim_names=tuple(mesh_sizes))
    return ParallelConfig.from_mesh(mesh, **{name: name for name in mesh_sizes}, **options)


def layer_of(config: MoEConfig) -> Callable[..., Any]:
    """Returns the layer as a function (weights, x, logits) -> y; several adapters alternate over the tokens."""

    def layer(weights: Any, x: Any, logits: Any) -> Any:
        several = config.lora is not None and config.lora.num_adapters > 1
        ids = torch.arange(x.shape[0]) % config.lora.num_adapters if config.lora is not None and several else None
        return moe_fn.moe_forward(config, weights, x, logits, adapter_ids=ids)

    return layer


def collectives_in(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if short_name(node) in COLLECTIVES]


def short_name(node: fx.Node) -> str:
    name = name_of(node)
    return (
        name.removeprefix("_c10d_functional.").removesuffix(".default") if name.startswith("_c10d_functional.") else ""
    )


def id_of(case: Any) -> str:
    mesh, options = case
    sequence = "sequence-" if "sequence_parallel" in options else ""
    return f"{'x'.join(f'{name}{n}' for name, n in mesh.items())}-{sequence}{options['dispatch']}"
