"""Invalid parallel configs raise a ValueError that names the argument, its value and what was expected."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_fn import MoEConfig, ParallelConfig, RankGroup, RouterWeights, join_weights, shard_weights
from moe_fn.balance import placement_of_slots
from moe_fn.balance.meeting import format_ranks
from moe_fn.config import ExpertNormConfig, SharedExpertsConfig
from moe_fn.parallel import check_ranks_agree
from moe_fn.parallel.agreement import differences
from moe_fn.testing import weights_for

BASE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 6, "intermediate_size": 4}
TWO, OTHER = RankGroup(name="0", size=2, rank=0), RankGroup(name="1", size=2, rank=1)
EP = ParallelConfig(ep=TWO)
CONFIGS = [MoEConfig(**BASE, parallel=ParallelConfig(ep=dataclasses.replace(TWO, rank=rank))) for rank in range(2)]
CONFIG, WHOLE = CONFIGS[0], weights_for(MoEConfig(**BASE))
SHARDS = [shard_weights(config, WHOLE) for config in CONFIGS]


def mesh(**sizes: int) -> Any:
    """Returns the attributes of a DeviceMesh that from_mesh reads before it asks for groups."""
    return SimpleNamespace(mesh_dim_names=tuple(sizes) or None)


def layer(parallel: ParallelConfig, **changes: Any) -> Callable[[], Any]:
    return lambda: MoEConfig(**(BASE | changes), parallel=parallel)


def parallel(**fields: Any) -> Callable[[], Any]:
    return lambda: ParallelConfig(**fields)


def sharding(config: MoEConfig = CONFIG, **changes: Any) -> Callable[[], Any]:
    return lambda: shard_weights(config, dataclasses.replace(WHOLE, **changes))


NARROW = dataclasses.replace(SHARDS[1], down=SHARDS[1].down[:, :, :3])
BAD: dict[str, Callable[[], Any]] = {
    r"tp='model'; expected one of the mesh's dimensions, \('dp', 'ep'\)": lambda: ParallelConfig.from_mesh(
        mesh(dp=1, ep=2), tp="model"
    ),
    r"ep='ep'; expected one of the mesh's dimensions, \(\)": lambda: ParallelConfig.from_mesh(mesh(), ep="ep"),
    "sequence_parallel=True without tp": lambda: ParallelConfig.from_mesh(mesh(ep=2), ep="ep", sequence_parallel=True),
    "sequence_parallel is 'yes'": lambda: ParallelConfig.from_mesh(mesh(tp=2), tp="tp", sequence_parallel="yes"),  # type: ignore[arg-type]
    r"ep and dp are both 'x'; expected different dimensions": lambda: ParallelConfig.from_mesh(
        mesh(x=2), ep="x", dp="x"
    ),
    "mesh is a str; expected a DeviceMesh": lambda: ParallelConfig.from_mesh("cpu", ep="ep"),
    "RankGroup.name is ''": lambda: RankGroup(name="", size=2, rank=0),
    "RankGroup.name is 3": lambda: RankGroup(name=3, size=2, rank=0),  # type: ignore[arg-type]
    "RankGroup.rank is 2; expected an int in 0..1": lambda: RankGroup(name="0", size=2, rank=2),
    "ParallelConfig.ep is 'ep'; expected a RankGroup": parallel(ep="ep"),
    "dispatch is 'nccl'": parallel(ep=TWO, dispatch="nccl"),
    "dispatch='all_to_all': expected ep": parallel(tp=TWO, dispatch="all_to_all"),
    "dispatch='all_gather': expected ep or dp": parallel(tp=TWO, dispatch="all_gather"),
    "max_tokens is None with dispatch='all_to_all_static'": parallel(ep=TWO, dispatch="all_to_all_static"),
    "max_tokens would have no effect": parallel(ep=TWO, max_tokens=3),
    "capacity would have no effect": parallel(ep=TWO, capacity=3),
    "gather='logits' would have no effect": parallel(ep=TWO, gather="logits"),
    "placement would have no effect without ep": parallel(tp=TWO, placement="round_robin"),
    r"placement\[1\] is 2; expected an int in 0..1": parallel(ep=TWO, placement=(0, 2, 1, 0)),
    "placement is 'random'": parallel(ep=TWO, placement="random"),
    "sp: expected tp=None": parallel(sp=TWO, tp=OTHER, ep=OTHER, dispatch="all_to_all", shared="replicated"),
    "shared='sharded' with sp": parallel(sp=TWO, ep=TWO, dispatch="all_to_all"),
    "placement has 3 ranks; expected one for each of 4 experts": layer(ParallelConfig(ep=TWO, placement=(0, 1, 0))),
    "leaves 1 of 5 ranks of ep without an expert": layer(ParallelConfig(ep=RankGroup(name="0", size=5, rank=0))),
    "leaves 1152921504606846972 of 1152921504606846976 ranks": layer(
        ParallelConfig(ep=RankGroup(name="0", size=2**60, rank=0))
    ),
    "leaves 1 of 2 ranks of ep without an expert": layer(ParallelConfig(ep=TWO, placement=(0, 0, 0, 0))),
    "intermediate_size=5; expected a multiple of the 2 slices": layer(ParallelConfig(tp=TWO), intermediate_size=5),
    "SharedExpertsConfig.intermediate_size=3; expected a multiple": layer(
        ParallelConfig(tp=TWO), shared=SharedExpertsConfig(intermediate_size=3)
    ),
    "expert_norm with slices of experts": layer(ParallelConfig(tp=TWO), expert_norm=ExpertNormConfig()),
    "parallel with chunk_tokens or opaque": layer(EP, chunk_tokens=2),
    "MoEConfig.parallel is 'ep'": layer("ep"),  # type: ignore[arg-type]
    "shard_weights: config.parallel is None": sharding(MoEConfig(**BASE)),
    "shard_weights: config is a ParallelConfig; expected MoEConfig": sharding(EP),  # type: ignore[arg-type]
    "shard_weights: weights is a dict; expected MoEWeights": lambda: shard_weights(CONFIG, {}),  # type: ignore[arg-type]
    r"shard_weights: weights.gate_up is \(2, 8, 6\); expected \(num_experts": lambda: shard_weights(CONFIG, SHARDS[0]),
    r"shard_weights: weights.down is \(3, 6, 4\)": sharding(down=WHOLE.down[:3]),
    r"shard_weights: weights.down is \(4, 6, 3\)": sharding(down=WHOLE.down[:, :, :3]),
    "join_weights: 2 configs and 1 shards; expected equal numbers": lambda: join_weights(CONFIGS, SHARDS[:1]),
    "join_weights: no configs": lambda: join_weights([], []),
    r"join_weights: no shard of \(rank of ep, slice\) \[\(1, 0\)\]; expected 2 x 1": lambda: join_weights(
        CONFIGS[:1], SHARDS[:1]
    ),
    "join_weights: config.parallel is None": lambda: join_weights([MoEConfig(**BASE)], [WHOLE]),
    r"join_weights, shard 1: weights.down is \(2, 6, 3\); expected": lambda: join_weights(CONFIGS, [SHARDS[0], NARROW]),
    "join_weights: configs 0 and 1 are of different layers": lambda: join_weights(
        [CONFIG, dataclasses.replace(CONFIGS[1], top_k=1)], SHARDS
    ),
    "join_weights: shards 0 and 1 differ in whether they have gate_up_bias": lambda: join_weights(
        CONFIGS, [SHARDS[0], dataclasses.replace(SHARDS[1], gate_up_bias=None)]
    ),
    "check_ranks_agree: timeout_s is 0": lambda: check_ranks_agree(MoEConfig(**BASE), timeout_s=0),
    "check_ranks_agree: config is a dict": lambda: check_ranks_agree({}),  # type: ignore[arg-type]
    "torch.distributed has no process group": lambda: check_ranks_agree(CONFIG),
    "check_ranks_agree: weights is a dict": lambda: check_ranks_agree(MoEConfig(**BASE), {}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_way_to_share_says_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BAD[words]()


@pytest.mark.parametrize("missing", ["logical_of_physical", "physical_of_logical", "num_replicas"])
def test_copies_of_experts_are_placed_by_three_tensors(missing: str) -> None:
    placement = placement_of_slots(torch.tensor([0, 1, 2, 3, 0, 1]), num_experts=4)
    router = dataclasses.replace(
        WHOLE.router or RouterWeights(),
        **{field.name: getattr(placement, field.name) for field in dataclasses.fields(placement)},
    )
    config = MoEConfig(**BASE, parallel=ParallelConfig(ep=TWO, num_physical=6))
    assert shard_weights(config, dataclasses.replace(WHOLE, router=router)).gate_up.shape[0] == 3
    with pytest.raises(
        ValueError,
        match=r"weights.router has no placement; expected logical_of_physical, physical_of_logical and num_r",
    ):
        shard_weights(config, dataclasses.replace(WHOLE, router=dataclasses.replace(router, **{missing: None})))


def test_a_config_of_ranks_survives_json_pickle_and_copies() -> None:
    of_sequence = ParallelConfig(sp=TWO, ep=TWO, dispatch="all_to_all", shared="replicated")
    for mine in (
        EP,
        ParallelConfig(ep=TWO, placement=(1, 0, 0, 1)),
        ParallelConfig(tp=OTHER, dp=TWO, shared="replicated"),
        of_sequence,
    ):
        config = MoEConfig(**BASE, parallel=mine)
        for again in (
            MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
            pickle.loads(pickle.dumps(config)),
            copy.deepcopy(config),
        ):
            assert again == config and hash(again) == hash(config) and again.own == config.own
            assert again.parallel == mine and type(again.parallel) is ParallelConfig
    assert CONFIGS[0] != CONFIGS[1]


def record(rank: int, **changes: Any) -> dict[str, Any]:
    """Of a mesh of ep 2 x tp 2."""
    members = {"ep": [rank % 2, rank % 2 + 2], "tp": [rank // 2 * 2, rank // 2 * 2 + 1]}
    return {
        "fields": {"top_k": 2},
        "members": members,
        "coordinates": {"ep": rank // 2, "tp": rank % 2},
        "problems": [],
    } | changes


def test_ranks_that_see_groups_differently_are_named() -> None:
    good = {rank: record(rank) for rank in range(4)}
    assert differences(good) == []
    assert differences(good | {3: record(3, fields={"top_k": 1})}) == ["top_k is 2 on ranks 0-2 and 1 on rank 3"]
    swapped = record(3, members={"ep": [2, 3], "tp": [1, 3]})
    assert any(
        "ParallelConfig.tp is ranks 2, 3 on rank 2 and ranks 1, 3 on rank 3" in words
        for words in differences(good | {3: swapped})
    )
    twisted = record(2, coordinates={"ep": 1, "tp": 1})
    assert "ParallelConfig.ep joins ranks 0 and 2, which are 0 and 1 in tp" in differences(good | {2: twisted})


def test_ranks_are_counted_for_people() -> None:
    assert format_ranks(list(range(64))) == "ranks 0-63"
    assert torch.distributed.is_available()
