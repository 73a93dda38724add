"""The checkpoint loader and saver: laws over all layouts, sizes, shards and slices."""

import dataclasses
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from checkpoints import SAVED, Block, adapter_of, blocks, folder, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from support import law
from torch import Tensor

from moe_fn import ParallelConfig, RankGroup, RouterWeights, add_lora, shard_weights
from moe_fn.balance import placement_of_slots
from moe_fn.checkpoint import Layout, load_moe_weights, save_moe_weights
from moe_fn.checkpoint.axes import by_axes, patterns_of, sizes_of
from moe_fn.records import WEIGHT_PATHS, leaves_of_weights

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")

SHARD_BYTES = st.sampled_from([1, 64, 300, 10**9])


@law(blocks(), SHARD_BYTES, st.booleans())
def test_saving_undoes_loading(block: Block, shard_bytes: int, named: bool) -> None:
    with folder() as first, folder() as second:
        save_moe_weights(
            first, block.prefix, block.config, block.weights, layout=block.layout, max_shard_bytes=shard_bytes
        )
        loaded = load_moe_weights(
            first, block.prefix, block.config, layout=block.layout.name if named else block.layout
        )
        assert same_bits(loaded, block.weights)
        save_moe_weights(second, block.prefix, block.config, loaded, layout=block.layout, max_shard_bytes=shard_bytes)
        assert {file.name: file.read_bytes() for file in first.iterdir()} == {
            file.name: file.read_bytes() for file in second.iterdir()
        }


@pytest.mark.parametrize("layout", SAVED, ids=lambda layout: layout.name)
def test_saving_undoes_loading_in_every_layout(layout: Layout) -> None:
    settings(max_examples=3)(given(blocks((layout,)), SHARD_BYTES, st.booleans())(test_saving_undoes_loading.check))()


def parts(draw: Any, size: int) -> list[tuple[int, int]]:
    """Draws a split of 0..size into consecutive, nonempty ranges."""
    cuts = [0, *sorted(draw(st.sets(st.integers(1, size - 1)) if size > 1 else st.just(set()))), size]
    return list(itertools.pairwise(cuts))


@st.composite
def ranks(draw: Any) -> tuple[Block, list[tuple[int, ...]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Draws a block, and a split of its experts, its intermediates and those of the shared experts over ranks."""
    block = draw(blocks())
    order = draw(st.permutations(range(block.config.num_experts)))
    experts = [tuple(order[start:stop]) for start, stop in parts(draw, len(order))]
    shared = block.config.shared
    return (
        block,
        experts,
        parts(draw, block.config.intermediate_size),
        parts(draw, shared.intermediate_size) if shared else [(0, 0)],
    )


@law(ranks(), SHARD_BYTES)
def test_slices_of_ranks_make_up_the_whole(dealt: Any, shard_bytes: int) -> None:
    block, experts, intermediates, shared = dealt
    config, sizes, patterns = block.config, sizes_of(block.config), patterns_of(block.config)
    whole = {path: t for path, t in zip(WEIGHT_PATHS, leaves_of_weights(block.weights), strict=True) if t is not None}
    rebuilt = {path: torch.full_like(t, -1) for path, t in whole.items()}
    with folder() as path:
        save_moe_weights(path, block.prefix, config, block.weights, layout=block.layout, max_shard_bytes=shard_bytes)
        for mine, cut, shared_cut in itertools.product(experts, intermediates, shared):
            part = load_moe_weights(
                path, block.prefix, config, layout=block.layout, experts=mine, intermediate=slice(*cut),
                shared_intermediate=slice(*shared_cut) if config.shared else None,
            )  # fmt: skip
            local = {"E": len(mine), "I": cut[1] - cut[0], "M": shared_cut[1] - shared_cut[0]}
            places = {"E": list(mine), "I": list(range(*cut)), "M": list(range(*shared_cut))}
            for name, t in zip(WEIGHT_PATHS, leaves_of_weights(part), strict=True):
                if t is not None:
                    known = sizes | {"V": t.shape[0]}
                    put(
                        by_axes(rebuilt[name], patterns[name], known, AXES),
                        by_axes(t, patterns[name], known | local, AXES),
                        places,
                    )
    for name, t in rebuilt.items():
        assert torch.equal(t, whole[name]), name


@st.composite
def on_ranks(draw: Any) -> tuple[Block, ParallelConfig, Any]:
    """Draws a block, one of the ranks that share it, and a placement with replicated experts."""
    tp, dp, ep = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    block = draw(blocks(slices=tp * dp))
    tp = 1 if block.config.expert_norm else tp
    ep = min(ep, block.config.num_experts)

    def group(size: int) -> RankGroup | None:
        return RankGroup(name="0", size=size, rank=draw(st.integers(0, size - 1))) if size > 1 else None

    groups = {"tp": group(tp), "ep": group(ep)}
    options: dict[str, Any] = {"shared": draw(st.sampled_from(["sharded", "replicated"]))}
    placement = None
    if ep > 1:
        options["placement"] = draw(st.sampled_from(["linear", "round_robin"]))
        experts = block.config.num_experts
        if options["placement"] == "linear" and draw(st.booleans()):
            options["num_physical"] = -(-(experts + 1) // ep) * ep
            more = [draw(st.integers(0, experts - 1)) for _ in range(options["num_physical"] - experts)]
            slots = draw(st.permutations([*range(experts), *more]))
            placement = placement_of_slots(torch.tensor(slots), num_experts=experts)
    elif dp > 1 and not block.config.expert_norm:
        groups["dp"], options["dispatch"] = group(dp), "all_gather"  # slices over dp x tp
    return block, ParallelConfig(**groups, **options), placement


@law(on_ranks(), SHARD_BYTES)
def test_loading_with_config_parallel_equals_sharding_the_whole(dealt: Any, shard_bytes: int) -> None:
    block, parallel, placement = dealt
    config, whole = dataclasses.replace(block.config, parallel=parallel), block.weights
    with folder() as path:
        save_moe_weights(
            path, block.prefix, block.config, block.weights, layout=block.layout, max_shard_bytes=shard_bytes
        )
        mine = load_moe_weights(path, block.prefix, config, layout=block.layout, placement=placement)
    if placement is not None:
        tensors = {field.name: getattr(placement, field.name) for field in dataclasses.fields(placement)}
        whole = dataclasses.replace(whole, router=dataclasses.replace(whole.router or RouterWeights(), **tensors))
    assert same_bits(mine, shard_weights(config, whole))
    for shared in (False, True):
        adapters = [
            adapter_of(block.config, shared, mine.down.dtype),
            adapter_of(block.config, False, mine.down.dtype),
        ][: 2 - shared]
        whole_config, adapted = add_lora(block.config, block.weights, adapters)
        own_config, own = add_lora(config, mine, adapters)
        assert own_config == dataclasses.replace(whole_config, parallel=parallel)
        assert same_bits(own, shard_weights(own_config, dataclasses.replace(whole, lora=adapted.lora)))


AXES = tuple("EIMGXNBHLCDWZVK1")


def put(whole: Tensor, part: Tensor, places: dict[str, list[int]]) -> None:
    """Copies a rank's tensor to its place in the whole tensor. Both have one dim for each of AXES, of size 1 for an
    axis that they do not have.
    """
    index = [torch.tensor(places[axis] if whole.shape[dim] > 1 else [0]) for dim, axis in enumerate("EIM")]
    whole[index[0][:, None, None], index[1][:, None], index[2]] = part


@given(blocks(), SHARD_BYTES)
def test_several_blocks_share_a_folder(block: Block, shard_bytes: int) -> None:
    other = block.prefix.replace("layers.3", "layers.12")
    with folder() as path:
        for prefix in (block.prefix, other):
            save_moe_weights(
                path, prefix, block.config, block.weights, layout=block.layout, max_shard_bytes=shard_bytes
            )
        for prefix in (block.prefix, other):
            assert same_bits(load_moe_weights(path, prefix, block.config, layout=block.layout), block.weights)
        with pytest.raises(ValueError, match="already"):
            save_moe_weights(path, other, block.config, block.weights, layout=block.layout)


@given(blocks(), st.data())
def test_ranks_may_repeat_experts(block: Block, data: st.DataObject) -> None:
    """Experts may be repeated, in any order: each one is a copy."""
    experts = data.draw(st.lists(st.integers(0, block.config.num_experts - 1), min_size=1, max_size=6))
    with folder() as path:
        save_moe_weights(path, block.prefix, block.config, block.weights, layout=block.layout)
        mine = load_moe_weights(path, block.prefix, block.config, layout=block.layout, experts=experts)
    assert torch.equal(mine.gate_up, block.weights.gate_up[experts]) and torch.equal(
        mine.down, block.weights.down[experts]
    )
    if mine.down_bias is not None and block.weights.down_bias is not None:
        assert torch.equal(mine.down_bias, block.weights.down_bias[experts])


@given(blocks(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_a_dtype_is_for_all_but_the_router(block: Block, dtype: torch.dtype) -> None:
    with folder() as path:
        save_moe_weights(path, block.prefix, block.config, block.weights, layout=block.layout)
        loaded = load_moe_weights(path, block.prefix, block.config, layout=block.layout, dtype=dtype)
    for name, t, original in zip(
        WEIGHT_PATHS, leaves_of_weights(loaded), leaves_of_weights(block.weights), strict=True
    ):
        if t is not None and original is not None:
            assert torch.equal(t, original if name[0] == "router" else original.to(dtype)), name
            assert t.dtype == (original.dtype if name[0] == "router" else dtype)
