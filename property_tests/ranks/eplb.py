"""Checks of the placement of experts that each rank of test_eplb_ranks.py runs in its own process."""

import dataclasses
import datetime
import math
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from moe_fn import (
    LoRAConfig,
    LoRAWeights,
    MoEConfig,
    MoEWeights,
    ParallelConfig,
    RankGroup,
    RouterWeights,
    Routing,
    ZeroExpertsConfig,
    balance,
    moe_forward,
    moe_forward_routed,
    moe_forward_with_stats,
    shard_weights,
)
from moe_fn.parallel import check_ranks_agree
from moe_fn.testing import weights_for
from moe_fn.weights.prepare import to_panels

CONFIG = MoEConfig(
    num_experts=6,
    top_k=2,
    hidden_size=8,
    intermediate_size=5,
    backend="torch",
    lora=LoRAConfig(rank=2, experts="outer_shared"),
)
PARTS = ("gate_up", "down", "gate_up_bias", "down_bias")
# New slots: all ranks send, no rank sends, one rank receives one expert and the others only take part, ...
SLOTS = {
    "rotated": lambda slots: slots[2:] + slots[:2],
    "the same": lambda slots: slots,
    "one rank gets one": lambda slots: slots[-1:] + slots[1:],
    "reversed": lambda slots: slots[::-1],
    "within ranks": lambda slots: [slots[i ^ 1] for i in range(len(slots))],
}


def bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Returns a tensor of random bits, which may be NaN."""
    data = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def of_rank(weights: MoEWeights, rank: int, ranks: int) -> MoEWeights:
    parts = {name: getattr(weights, name).tensor_split(ranks)[rank] for name in PARTS}
    assert weights.lora is not None
    lora = {f.name: getattr(weights.lora, f.name) for f in dataclasses.fields(weights.lora)}
    own = {name: t if t.shape[1] == 1 else t.tensor_split(ranks, 1)[rank] for name, t in lora.items()}
    return dataclasses.replace(weights, **parts, lora=LoRAWeights(**own))


def assert_same_bits(a: MoEWeights, b: MoEWeights) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def check_moves(group: dist.ProcessGroup | None) -> None:
    """Checks every change of slots, in narrow and wide dtypes, and for the panels of prepared weights."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    slots = [slot % 6 for slot in range(4 * ranks)] if ranks > 1 else [0, 1, 2, 3, 4, 5, 0, 1]
    generator = torch.Generator().manual_seed(ranks)
    plain = weights_for(CONFIG, 1)
    panels = dict(zip(("gate_up", "down"), to_panels(CONFIG, plain.gate_up, plain.down), strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        noise = tree_map(lambda t: bits(t.shape, dtype, generator), plain)  # noqa: B023
        for weights in (noise, dataclasses.replace(plain, **panels)):
            for change in SLOTS.values():
                previous, new = (
                    balance.placement_of_slots(torch.tensor(s), num_experts=6) for s in (slots, change(slots))
                )
                before, after = (of_rank(balance.physical_weights(weights, p), rank, ranks) for p in (previous, new))
                kept = tree_map(torch.clone, before)
                assert_same_bits(balance.move_experts(before, previous, new, group), after)
                assert_same_bits(before, kept)


def check_the_layer_during_moves() -> None:
    """Checks the output of the rank's slots between the start and the end of moves and after them, with the current
    placement.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weights = dataclasses.replace(weights_for(CONFIG, 2), router=None)
    load = torch.tensor([9, 1, 2, 30, 4, 2])
    previous = balance.place_experts(load.flip(0), 8, 1, 1, ranks)
    new = balance.place_experts(load, 8, 1, 1, ranks, previous)
    local = dataclasses.replace(CONFIG, num_experts=8 // ranks)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(8).view(8, 1) % 6

    def answer(own: MoEWeights, placement: balance.Placement) -> Tensor:
        slots = balance.physical_ids(placement, torch.cat([ids, (ids + 1) % 6], 1)) - rank * local.num_experts
        slots = torch.where((slots >= 0) & (slots < local.num_experts), slots, -1)
        y = moe_forward_routed(local, own, x, Routing(expert_ids=slots, weights=torch.full((8, 2), 0.5)))
        dist.all_reduce(y)
        return y

    own = of_rank(balance.physical_weights(weights, previous), rank, ranks)
    expected = answer(own, previous)
    finish = balance.start_moving(own, previous, new)
    assert torch.equal(answer(own, previous), expected)
    moved = finish()
    assert torch.equal(answer(own, previous), expected)
    torch.testing.assert_close(answer(moved, new), expected, rtol=1e-5, atol=1e-6)


def whole_and_local(parallel: ParallelConfig) -> tuple[MoEConfig, MoEConfig]:
    whole = MoEConfig(
        num_experts=6,
        top_k=2,
        hidden_size=8,
        intermediate_size=4,
        zero_experts=ZeroExpertsConfig(count=1),
        backend="torch",
    )
    return whole, dataclasses.replace(whole, parallel=parallel)


def with_placement(weights: MoEWeights, placement: balance.Placement) -> MoEWeights:
    tensors = {f.name: getattr(placement, f.name) for f in dataclasses.fields(placement)}
    return dataclasses.replace(weights, router=dataclasses.replace(weights.router or RouterWeights(), **tensors))


def check_the_recipe_of_the_package() -> None:
    """Runs the code of moe_fn.balance's docstring with different tokens on each rank: all ranks move weights, and y
    does not change.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = RankGroup(name=dist.group.WORLD.group_name, size=ranks, rank=rank)
    whole, config = whole_and_local(ParallelConfig(ep=own, dispatch="all_to_all", num_physical=8))
    full = weights_for(whole, 4)
    placement = balance.placement_of_slots(torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), num_experts=6)
    weights = shard_weights(config, with_placement(full, placement))
    x = torch.randn(9 + rank, 8, generator=torch.Generator().manual_seed(rank))
    expected = moe_forward(whole, full, x)
    _, stats = moe_forward_with_stats(config, weights, x)
    names = {name: getattr(balance, name) for name in balance.__all__} | {
        "num_experts": 6, "num_physical": 8, "groups": 1, "nodes": 1, "gpus": ranks, "group": None, "weights": weights,
        "stats": stats,
        "placement": placement, "window": balance.load_window(2, 6),
    }  # fmt: skip
    recipe = [line for line in (balance.__doc__ or "").splitlines() if re.match(r"    [\w, ]+ = \w", line)]
    assert len(recipe) == 4
    exec("\n".join(line.strip() for line in recipe), names)
    loads = [torch.zeros(7, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(loads, stats.expert_load)
    assert torch.equal(names["load"], sum(loads)[:6])  # type: ignore[index]
    for group in (own, dist.group.WORLD):
        assert torch.equal(balance.load_over_ranks(stats.expert_load, group), sum(loads))  # type: ignore[arg-type]
    moved = with_placement(names["weights"], names["placement"])
    torch.testing.assert_close(moe_forward(config, moved, x), expected, rtol=1e-5, atol=1e-5)


def check_errors_of_ranks_that_differ() -> None:
    """Checks that every rank raises the same error, and nothing is sent, if each rank places by its own tokens.

    The same for tensors that differ, and for an error of one rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    load = torch.tensor([9, 1, 2, 30, 4, 2]).roll(rank)
    previous = balance.place_experts(torch.ones(6), 8, 1, 1, ranks)
    new = balance.place_experts(load, 8, 1, 1, ranks)
    weights = of_rank(balance.physical_weights(weights_for(CONFIG, 2), previous), rank, ranks)
    narrow = dataclasses.replace(weights, down=weights.down.to(torch.float16)) if rank == 1 else weights
    few = dataclasses.replace(weights, gate_up=weights.gate_up[:1]) if rank == 1 else weights
    for given, target, words in (
        (weights, new, r"slot \d of new is \d on rank 0.* and \d on rank.*made from load_over_ranks"),
        (narrow, previous, r"weights.down is 'torch.float32 \[.*' on rank.* and 'torch.float16 \[.*' on rank 1"),
        (weights, None if rank == 1 else previous, "move_experts: rank 1: new is a NoneType; expected Placement"),
        (few, previous, r"move_experts: rank 1: weights.gate_up is \[1, 10, 8\]; expected \d experts in dim 0"),
    ):
        try:
            balance.move_experts(given, previous, target)
        except ValueError as error:
            assert re.search(words, str(error)), error
            found: list[str] = [""] * ranks
            dist.all_gather_object(found, str(error))
            assert len(set(found)) == 1
        else:
            raise AssertionError("no ValueError")
    own = RankGroup(name=dist.group.WORLD.group_name, size=ranks, rank=rank)
    _, config = whole_and_local(ParallelConfig(ep=own, dispatch="all_to_all", num_physical=8))
    local = shard_weights(config, with_placement(weights_for(whole_and_local(ParallelConfig(ep=own))[0], 4), new))
    try:
        check_ranks_agree(config, local)
    except ValueError as error:
        assert re.search(r"slot \d of weights.router.logical_of_physical is \d on rank", str(error)), error
    else:
        raise AssertionError("no ValueError")


def check_refusals(group: dist.ProcessGroup, member: bool) -> None:
    """Checks errors that every rank raises before any communication."""
    layers = balance.place_experts(torch.ones(2, 6), 8, 1, 1, 4)
    one = balance.placement_at(layers, 0)
    weights = of_rank(balance.physical_weights(weights_for(CONFIG), one), dist.get_rank(), 4)
    refused = [(layers, layers, None), (one, balance.place_experts(torch.ones(6), 12, 1, 1, 4), None)]
    refused += [] if member else [(one, one, group)]
    for previous, new, where in refused:
        try:
            balance.move_experts(weights, previous, new, where)
        except ValueError:
            continue
        raise AssertionError("no ValueError")
    try:
        balance.move_experts(of_rank(weights, 0, 2), one, one)
    except ValueError as error:
        assert "expected 2 experts" in str(error)
    else:
        raise AssertionError("no ValueError")


def run(rank: int, ranks: int, folder: str) -> None:
    """Runs every check on one rank; an exception ends the process, and the parent process reads its exit code."""
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    try:
        check_moves(None)
        check_the_layer_during_moves()
        check_the_recipe_of_the_package()
        check_errors_of_ranks_that_differ()
        if ranks == 4:
            pairs = [
                dist.new_group([1, 3]),
                dist.new_group([0, 2]),
            ]  # ranks in the group differ from ranks in the world
            own = pairs[0] if rank in (1, 3) else pairs[1]
            check_moves(own)
            check_refusals(pairs[0], rank in (1, 3))
        dist.barrier()
    finally:
        dist.destroy_process_group()
