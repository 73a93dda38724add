"""Laws of the placement of experts, of ids and loads converted by it, and of moves between two placements."""

import dataclasses
import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import law
from torch import Tensor
from torch.utils._pytree import tree_map

import moe_fn
from moe_fn import MoEConfig, MoEWeights, Routing, SharedExpertsConfig, ZeroExpertsConfig, balance
from moe_fn.balance import LoadWindow, Move, Moves, Placement
from moe_fn.balance.slots import fields_of_slots
from moe_fn.testing import assert_matches, weights_for

ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Cluster:
    """Loads of experts, and sizes of a cluster to place them on. `later` has loads of a later time."""

    load: Tensor  # [layers, E]
    later: Tensor
    num_physical: int
    num_groups: int
    num_nodes: int
    num_gpus: int

    def place(self, load: Tensor, previous: Placement | None = None) -> Placement:
        return balance.place_experts(load, self.num_physical, self.num_groups, self.num_nodes, self.num_gpus, previous)

    @property
    def nodes(self) -> int:
        """The number of nodes for the algorithm: 1 where the groups are not a multiple of the nodes."""
        return self.num_nodes if self.num_groups % self.num_nodes == 0 else 1


@st.composite
def clusters(draw: st.DrawFn, distinct: bool = False) -> Cluster:
    """Draws up to 3 nodes of up to 4 GPUs, with integer loads with ties and zeros, or skewed and distinct
    float loads.
    """
    nodes, gpus_per_node = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 4)))
    groups = draw(st.sampled_from((nodes, 2 * nodes, 3 * nodes, 1, 5)))
    experts, gpus = groups * draw(st.integers(1, 4)), nodes * gpus_per_node
    physical = -(-experts // gpus) * gpus + gpus * draw(st.integers(0, 3))
    shape = (draw(st.integers(1, 3)), experts)
    if distinct or draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        load, later = (torch.rand(shape, generator=generator, dtype=torch.float64) ** -0.8 for _ in range(2))
    else:
        numbers = st.lists(st.integers(0, 9), min_size=math.prod(shape), max_size=math.prod(shape))
        load, later = (torch.tensor(draw(numbers)).view(shape) for _ in range(2))
    return Cluster(load, later, physical, groups, nodes, gpus)


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Placement, int]:
    """Draws two placements of one layer with the same sizes, and the number of GPUs."""
    gpus, per_gpu = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    experts = draw(st.integers(1, gpus * per_gpu))
    rest = st.lists(st.integers(0, experts - 1), min_size=gpus * per_gpu - experts, max_size=gpus * per_gpu - experts)
    slots = (torch.tensor(draw(st.permutations([*range(experts), *draw(rest)]))) for _ in range(2))
    previous, new = (balance.placement_of_slots(s, num_experts=experts) for s in slots)
    return previous, new, gpus


def layers_of(placement: Placement) -> list[Placement]:
    return [balance.placement_at(placement, layer) for layer in range(len(placement.logical_of_physical))]


def by_gpu(placement: Placement, num_gpus: int) -> list[list[int]]:
    """Returns the experts on each GPU, for one layer."""
    return placement.logical_of_physical.view(num_gpus, -1).tolist()


def fullest(placement: Placement, load: Tensor, num_gpus: int) -> list[float]:
    return balance.gpu_load(placement, load, num_gpus).amax(-1).tolist()


# Placing


def test_the_vectors_of_the_published_algorithm() -> None:
    load = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    expected = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    for numbers in (load, load.double(), load.to(torch.int32), load.half()):
        placement = balance.place_experts(numbers, num_physical=16, num_groups=4, num_nodes=2, num_gpus=8)
        assert placement.logical_of_physical.tolist() == expected
    assert placement.num_replicas.sum(-1).tolist() == [16, 16]
    assert placement.physical_of_logical[0, 5].tolist() == [0, 2]
    assert placement.physical_of_logical[1, 7].tolist() == [0, -1]
    one = balance.place_experts(load[1], num_physical=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert one.logical_of_physical.tolist() == expected[1]


def test_slots_are_kept_as_in_the_published_extension() -> None:
    previous = balance.placement_of_slots(torch.tensor([3, 0, 1, 2, 0, 1]), num_experts=4)
    new = balance.place_experts(
        torch.tensor([2, 9, 4, 6]), num_physical=6, num_groups=1, num_nodes=1, num_gpus=2, previous=previous
    )
    plain = balance.place_experts(torch.tensor([2, 9, 4, 6]), num_physical=6, num_groups=1, num_nodes=1, num_gpus=2)
    assert plain.logical_of_physical.tolist() == [1, 2, 0, 1, 3, 3]
    assert new.logical_of_physical.tolist() == [2, 0, 1, 3, 3, 1]


@law(clusters())
def test_every_expert_is_placed(cluster: Cluster) -> None:
    placement = cluster.place(cluster.load)
    experts = cluster.load.shape[1]
    assert placement.num_replicas.min() >= 1
    assert (placement.num_replicas.sum(-1) == cluster.num_physical).all()
    for layer in layers_of(placement):
        slots = layer.logical_of_physical.tolist()
        assert len(slots) == cluster.num_physical
        for expert in range(experts):
            own = [slot for slot, held in enumerate(slots) if held == expert]
            padding = [-1] * (layer.physical_of_logical.shape[1] - len(own))
            assert layer.physical_of_logical[expert].tolist() == own + padding
            assert layer.num_replicas[expert] == len(own)
        size, groups_per_node = experts // cluster.num_groups, cluster.num_groups // cluster.nodes
        for node in by_gpu(layer, cluster.nodes) if cluster.num_groups % cluster.num_nodes == 0 else []:
            groups = {expert // size for expert in node}
            assert len(groups) == groups_per_node
            assert set(node) == {group * size + i for group in groups for i in range(size)}


@law(clusters())
def test_gpus_are_balanced_within_the_proven_bound(cluster: Cluster) -> None:
    placement = cluster.place(cluster.load)
    gpus, nodes, experts = cluster.num_gpus // cluster.nodes, cluster.nodes, cluster.load.shape[1]
    spare = (cluster.num_physical - experts) // nodes
    groups = cluster.num_groups if nodes > 1 else 1
    for layer, load in zip(layers_of(placement), cluster.load.double(), strict=True):
        per_gpu = balance.gpu_load(layer, load, cluster.num_gpus)
        share = (load / layer.num_replicas)[layer.logical_of_physical].view(nodes, -1)
        of_node = per_gpu.view(nodes, -1).sum(-1)
        heaviest_group = float(load.view(groups, -1).sum(-1).max())
        assert float(of_node.max()) <= (float(load.sum()) / nodes + (1 - 1 / nodes) * heaviest_group) * ROUNDING
        if nodes == 1:  # every placement has at least the mean, and at least the smallest possible largest share
            at_least = max(float(load.sum()) / gpus, float(share.max()))
            assert float(per_gpu.max()) <= (2 - 1 / gpus) * at_least * ROUNDING
        for node in range(nodes):
            total, largest = float(of_node[node]), float(share[node].max())
            assert largest <= total / (spare + 1) * ROUNDING + 1e-9
            assert (
                float(per_gpu.view(nodes, -1)[node].max())
                <= (total / gpus + (1 - 1 / gpus) * largest) * ROUNDING + 1e-9
            )


@law(st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 12)))
def test_greedy_replication_is_optimal(case: tuple[list[int], int]) -> None:
    load, extra = case
    slots = balance.replicate(load, len(load) + extra)
    count = Counter(slots)
    assert set(count) == set(range(len(load))) and len(slots) == len(load) + extra
    found = max(Fraction(n, count[expert]) for expert, n in enumerate(load))

    def enough(share: Fraction) -> bool:
        """Whether the slots suffice for shares of at most this size."""
        return sum(max(1, math.ceil(n / share)) for n in load) <= len(slots)

    candidates = {Fraction(n, r) for n in load for r in range(1, extra + 2)} - {Fraction(0)}
    assert found == min((share for share in candidates if enough(share)), default=0)


@law(st.tuples(st.lists(st.floats(0, 100), min_size=6, max_size=30), st.integers(1, 6)))
def test_packs_differ_by_the_heaviest_item_at_most(case: tuple[list[float], int]) -> None:
    weights, num_packs = case
    weights = weights[: len(weights) // num_packs * num_packs]
    packs = balance.pack(weights, num_packs)
    assert sorted(itertools.chain(*packs)) == list(range(len(weights)))
    assert {len(items) for items in packs} == {len(weights) // num_packs}
    loads = [sum(weights[item] for item in items) for items in packs]
    assert max(loads) - min(loads) <= max(weights) * ROUNDING


@law(clusters())
def test_a_placement_is_never_worse_than_the_previous_one(cluster: Cluster) -> None:
    previous = cluster.place(cluster.load)
    new = cluster.place(cluster.later, previous)
    fresh = fullest(cluster.place(cluster.later), cluster.later, cluster.num_gpus)
    gpus = cluster.num_gpus
    for layer, (now, before) in enumerate(
        zip(fullest(new, cluster.later, gpus), fullest(previous, cluster.later, gpus), strict=True)
    ):
        assert now <= before
        assert now <= fresh[layer] * ROUNDING
        if fresh[layer] >= before:
            assert torch.equal(new.logical_of_physical[layer], previous.logical_of_physical[layer])


@law(st.tuples(clusters(distinct=True), st.randoms(use_true_random=False)))
def test_relabelling_experts_relabels_the_placement(case: tuple[Cluster, Any]) -> None:
    cluster, random = case
    groups = cluster.num_groups if cluster.num_groups % cluster.num_nodes == 0 else 1
    size = cluster.load.shape[1] // groups
    new_label: list[int] = []  # permutes groups, and experts inside groups
    for group in random.sample(range(groups), groups):
        new_label += [group * size + i for i in random.sample(range(size), size)]
    relabelled = torch.empty_like(cluster.load)
    relabelled[:, new_label] = cluster.load
    for a, b in zip(layers_of(cluster.place(cluster.load)), layers_of(cluster.place(relabelled)), strict=True):
        ours = sorted(sorted(new_label[expert] for expert in gpu) for gpu in by_gpu(a, cluster.num_gpus))
        assert ours == sorted(sorted(gpu) for gpu in by_gpu(b, cluster.num_gpus))


@law(clusters())
def test_experts_that_stay_on_a_gpu_keep_their_slots(cluster: Cluster) -> None:
    previous = cluster.place(cluster.load)
    new = cluster.place(cluster.later, previous)
    for old_layer, new_layer in zip(layers_of(previous), layers_of(new), strict=True):
        for old, now in zip(by_gpu(old_layer, cluster.num_gpus), by_gpu(new_layer, cluster.num_gpus), strict=True):
            stay = (Counter(old) & Counter(now)).total()
            assert sum(a == b for a, b in zip(old, now, strict=True)) == stay


@law(clusters())
def test_layers_are_placed_one_by_one(cluster: Cluster) -> None:
    previous = cluster.place(cluster.load)
    together = cluster.place(cluster.later, previous)
    for layer, load in enumerate(cluster.later):
        alone = cluster.place(load, balance.placement_at(previous, layer))
        assert alone.logical_of_physical.ndim == 1
        assert torch.equal(alone.logical_of_physical, together.logical_of_physical[layer])
        assert torch.equal(alone.num_replicas, together.num_replicas[layer])


def test_a_large_model_is_placed_quickly() -> None:
    load = torch.rand(58, 256, generator=torch.Generator().manual_seed(0)) ** -0.5
    start = time.perf_counter()
    previous = balance.place_experts(load, 288, 8, 4, 32)
    new = balance.place_experts(load.flip(1), 288, 8, 4, 32, previous)
    balance.transfers(previous, new, 32)
    assert time.perf_counter() - start < 2


LOAD = torch.ones(2, 8)
BAD = {
    "negative": (lambda: balance.place_experts(-LOAD, 8, 2, 2, 2), "load of expert 0 in row 0 is -1.0"),
    "not a number": (lambda: balance.place_experts(LOAD / 0 - LOAD / 0, 8, 2, 2, 2), "nan"),
    "infinite": (lambda: balance.place_experts(LOAD / 0, 8, 2, 2, 2), "inf"),
    "no tensor": (lambda: balance.place_experts([1, 2], 2, 1, 1, 1), "a list"),
    "three dimensions": (lambda: balance.place_experts(torch.ones(1, 1, 2), 2, 1, 1, 1), r"\[1, 1, 2\]"),
    "no experts": (lambda: balance.place_experts(torch.ones(2, 0), 2, 1, 1, 1), r"\[2, 0\]"),
    "too few slots": (lambda: balance.place_experts(LOAD, 6, 2, 2, 2), "num_physical=6"),
    "groups": (lambda: balance.place_experts(LOAD, 8, 3, 1, 2), "multiple of num_groups=3"),
    "GPUs of nodes": (lambda: balance.place_experts(LOAD, 9, 2, 2, 3), "num_gpus is 3"),
    "slots of GPUs": (lambda: balance.place_experts(LOAD, 9, 2, 2, 2), "num_physical is 9"),
    "no nodes": (lambda: balance.place_experts(LOAD, 8, 2, 0, 2), "num_nodes=0"),
    "previous of other sizes": (
        lambda: balance.place_experts(LOAD, 10, 2, 2, 2, balance.place_experts(LOAD, 8, 2, 2, 2)),
        r"previous.logical_of_physical is \[2, 8\]; expected \[2, 10\]",
    ),
    "an expert nowhere": (lambda: balance.placement_of_slots(torch.tensor([0, 0]), 2), r"\[1\]"),
    "an expert too many": (lambda: balance.placement_of_slots(torch.tensor([0, 2, 1]), 2), r"\[2\]"),
    "slots as floats": (lambda: balance.placement_of_slots(torch.tensor([0.0]), 1), "float32"),
    "ids as floats": (lambda: balance.physical_ids(ONE, torch.zeros(2, 1)), "float32"),
    "ids without top_k": (lambda: balance.physical_ids(ONE, torch.zeros(2, dtype=torch.int64)), r"\[2\]"),
    "token_index of another length": (lambda: balance.physical_ids(ONE, IDS, torch.arange(3)), r"\[3\]"),
    "token_index with top_k": (lambda: balance.physical_ids(ONE, IDS, IDS), r"\[2, 1\]"),
    "ids through layers": (lambda: balance.physical_ids(balance.place_experts(LOAD, 8, 2, 2, 2), IDS), "placement_at"),
    "load of other slots": (lambda: balance.logical_load(ONE, torch.ones(3)), r"\[3\]; expected \[2\]"),
    "load of other experts": (lambda: balance.gpu_load(ONE, torch.ones(2), 1), r"\[2\]; expected \[1\]"),
    "load on GPUs": (lambda: balance.gpu_load(ONE, torch.ones(1), 3), "num_gpus=3"),
    "window of nothing": (lambda: balance.load_window(0, 3), "size=0"),
    "window of floats": (lambda: balance.load_window(2, 3, dtype=torch.float32), "float32"),
    "a load of another shape": (lambda: balance.push(balance.load_window(2, 3), torch.ones(2, dtype=torch.int64)),
    r"\[2\]; expected"),
    "a load that is no tensor": (lambda: balance.push(balance.load_window(2, 3), [1, 2, 3]), "a list"),
    "no window": (lambda: balance.push(torch.ones(2, 3), torch.ones(3)), "a Tensor; expected LoadWindow"),
    "the total of a load": (lambda: balance.total(torch.ones(2, 3)), "a Tensor; expected LoadWindow"),
    "a layer of no placement": (lambda: balance.placement_at(LOAD, 0), "a Tensor; expected Placement"),
    "a layer too many": (lambda: balance.placement_at(balance.place_experts(LOAD, 8, 2, 2, 2), 2),
    "layer=2; expected one of its 2"),
    "a group by its name": (lambda: balance.load_over_ranks(LOAD, "ep"), "group is a str"),
    "a load of no experts": (lambda: balance.update_correction_bias(torch.tensor(0.0), torch.tensor(1), 1.0),
    r"\[\]; expected \[..., E\]"),
    "a load elsewhere": (lambda: balance.update_correction_bias(torch.zeros(8, device="meta"), LOAD[0], 1.0),
    "on cpu; expected .* meta"),
    "a load of floats": (lambda: balance.push(balance.load_window(2, 3), torch.ones(3)), "float32"),
    "moves between other sizes": (lambda: balance.transfers(ONE, SMALLER, 1), r"\[2\]; expected \[1\]"),
    "moves on other GPUs": (lambda: balance.transfers(ONE, ONE, 3), "num_gpus=3"),
    "weights of other experts": (lambda: balance.physical_weights(weights_for(CONFIG), ONE), "expected 1 experts"),
}  # fmt: skip
ONE = balance.placement_of_slots(torch.tensor([0, 0]), num_experts=1)
SMALLER = balance.placement_of_slots(torch.tensor([0]), num_experts=1)
IDS = torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_placement_on_meta_has_nothing_to_compare() -> None:
    """check_ranks_agree compares no placements on the meta device."""
    assert fields_of_slots("slots", torch.empty(2, dtype=torch.int64, device="meta")) == {}
    assert fields_of_slots("slots", torch.tensor([1, 0])) == {"slot 0 of slots": 1, "slot 1 of slots": 0}


# Ids and loads


@law(st.tuples(placements(), st.lists(st.integers(-1, 9), max_size=24), st.sampled_from((torch.int32, torch.int64))))
def test_physical_ids_map_back_to_the_logical_ids(
    case: tuple[tuple[Placement, Placement, int], list[int], torch.dtype],
) -> None:
    (placement, _, _), numbers, dtype = case
    ids = torch.tensor([n % len(placement.num_replicas) if n >= 0 else n for n in numbers], dtype=dtype).view(-1, 1)
    physical = balance.physical_ids(placement, ids)
    assert physical.dtype == dtype and physical.shape == ids.shape
    back = torch.where(physical < 0, -1, placement.logical_of_physical[physical.clamp(min=0).long()])
    assert torch.equal(back.to(dtype), ids)
    boxed = balance.physical_ids(placement, ids.view(1, -1, 1), torch.arange(len(ids)).view(1, -1))
    assert torch.equal(boxed.view(-1, 1), physical)


@law(st.tuples(placements(), st.integers(0, 30), st.integers(-40, 40)))
def test_replicas_take_turns(case: tuple[tuple[Placement, Placement, int], int, int]) -> None:
    (placement, _, _), tokens, first = case
    for expert, replicas in enumerate(placement.num_replicas.tolist()):
        ids = torch.full((tokens, 1), expert)
        physical = balance.physical_ids(placement, ids, torch.arange(first, first + tokens))
        count = [int((physical == slot).sum()) for slot in placement.physical_of_logical[expert, :replicas].tolist()]
        assert sum(count) == tokens
        assert max(count) - min(count) <= 1


@law(st.tuples(placements(), st.lists(st.integers(-1, 3), max_size=9)))
def test_ids_of_padding_and_zero_experts_are_kept(case: tuple[tuple[Placement, Placement, int], list[int]]) -> None:
    (placement, _, _), numbers = case
    experts, physical = len(placement.num_replicas), len(placement.logical_of_physical)
    ids = torch.tensor([[n if n < 0 else experts + n] for n in numbers], dtype=torch.int64).view(-1, 1)
    expected = [n if n < 0 else physical + n for n in numbers]
    assert balance.physical_ids(placement, ids).flatten().tolist() == expected


CONFIG = MoEConfig(
    num_experts=5, top_k=3, hidden_size=6, intermediate_size=4, expert_norm=moe_fn.ExpertNormConfig(),
    shared=SharedExpertsConfig(intermediate_size=3), zero_experts=ZeroExpertsConfig(count=2, kind="constant"),
    backend="torch",
)  # fmt: skip


@law(st.tuples(st.integers(0, 12), st.integers(0, 2**20), st.lists(st.integers(0, 4), max_size=6)))
def test_a_layer_on_physical_slots_is_the_logical_layer(case: tuple[int, int, list[int]]) -> None:
    tokens, seed, extra = case
    generator = torch.Generator().manual_seed(seed)
    weights = dataclasses.replace(weights_for(CONFIG, generator, dtype=torch.float64), router=None)
    order = torch.randperm(5 + len(extra), generator=generator)
    placement = balance.placement_of_slots(torch.tensor([*range(5), *extra])[order], num_experts=5)
    x = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    routing = Routing(
        expert_ids=torch.randint(-1, 7, (tokens, 3), generator=generator),
        weights=torch.rand(tokens, 3, generator=generator, dtype=torch.float64),
    )
    physical = dataclasses.replace(routing, expert_ids=balance.physical_ids(placement, routing.expert_ids))
    config = dataclasses.replace(CONFIG, num_experts=5 + len(extra))
    actual = moe_fn.moe_forward_routed(config, balance.physical_weights(weights, placement), x, physical)
    assert_matches(actual, moe_fn.moe_forward_routed(CONFIG, weights, x, routing), scale=0.1)
    of_slots = balance.expert_load(physical.expert_ids, config.num_experts)
    assert torch.equal(balance.logical_load(placement, of_slots), balance.expert_load(routing.expert_ids, 5))


@law(clusters())
def test_loads_keep_their_totals(cluster: Cluster) -> None:
    placement = cluster.place(cluster.load)
    of_slots = torch.arange(placement.logical_of_physical.numel()).view(placement.logical_of_physical.shape)
    logical = balance.logical_load(placement, of_slots)
    for layer, one in enumerate(layers_of(placement)):
        for expert, load in enumerate(logical[layer].tolist()):
            assert load == sum(
                of_slots[layer, slot].item() for slot in one.physical_of_logical[expert].tolist() if slot >= 0
            )
    assert torch.equal(logical.sum(-1), of_slots.sum(-1))
    per_gpu = balance.gpu_load(placement, cluster.load, cluster.num_gpus)
    assert torch.allclose(per_gpu.sum(-1), cluster.load.double().sum(-1), rtol=1e-12, atol=0)
    evenness = balance.balancedness(per_gpu)
    assert ((evenness >= 1 / cluster.num_gpus - 1e-9) & (evenness <= ROUNDING)).all()


@law(st.tuples(st.integers(1, 4), st.lists(st.lists(st.integers(0, 2**40), min_size=3, max_size=3), max_size=12)))
def test_a_window_is_the_sum_of_the_last_loads(case: tuple[int, list[list[int]]]) -> None:
    size, loads = case
    window = first = balance.load_window(size, 3)
    for step, load in enumerate(loads, 1):
        window = balance.push(window, torch.tensor(load))
        last = torch.tensor(loads[max(step - size, 0) : step])
        assert torch.equal(balance.total(window), last.sum(0))
        assert int(window.step) == step
    assert not first.ring.any() and int(first.step) == 0
    again = tree_map(lambda t: t.clone(), window)
    assert isinstance(again, LoadWindow) and torch.equal(again.ring, window.ring)


def test_a_window_of_32_bits_sums_in_64() -> None:
    window = balance.load_window(2, 1, dtype=torch.int32)
    for _ in range(2):
        window = balance.push(window, torch.tensor([2**31 - 1]))
    assert window.ring.dtype == torch.int32
    assert balance.total(window).tolist() == [2**32 - 2]


# Moves


def carried_out(previous: list[int], moves: Moves) -> list[int]:
    slots = list(previous)
    for move in (*moves.copies, *moves.transfers):
        slots[move.target] = previous[move.source]
    for move in moves.repeats:
        slots[move.target] = slots[move.source]
    return slots


@law(placements())
def test_moves_turn_the_previous_placement_into_the_new_one(case: tuple[Placement, Placement, int]) -> None:
    previous, new, gpus = case
    moves = balance.transfers(previous, new, gpus)
    old, wanted = previous.logical_of_physical.tolist(), new.logical_of_physical.tolist()
    assert carried_out(old, moves) == wanted
    every = (*moves.copies, *moves.transfers, *moves.repeats)
    assert len({move.target for move in every}) == len(every)
    for move in every:
        assert (moves.gpu_of(move.source) == moves.gpu_of(move.target)) == (move not in moves.transfers)
        assert old[move.target] != wanted[move.target]


@law(placements())
def test_a_gpu_receives_an_expert_at_most_once_and_only_if_it_lacks_it(case: tuple[Placement, Placement, int]) -> None:
    previous, new, gpus = case
    moves = balance.transfers(previous, new, gpus)
    old = previous.logical_of_physical.tolist()
    lacks = {
        (gpu, expert)
        for gpu, (had, gets) in enumerate(zip(by_gpu(previous, gpus), by_gpu(new, gpus), strict=True))
        for expert in set(gets) - set(had)
    }
    assert sorted((moves.gpu_of(move.target), old[move.source]) for move in moves.transfers) == sorted(lacks)


@law(placements())
def test_the_busiest_sender_has_the_fewest_possible_transfers(case: tuple[Placement, Placement, int]) -> None:
    previous, new, gpus = case
    moves = balance.transfers(previous, new, gpus)
    old, had = previous.logical_of_physical.tolist(), by_gpu(previous, gpus)
    holders = [{gpu for gpu in range(gpus) if old[move.source] in had[gpu]} for move in moves.transfers]
    # A set of GPUs must send all experts that only they have. This is a lower bound, and the largest one is attained.
    some = (set(chosen) for size in range(1, gpus + 1) for chosen in itertools.combinations(range(gpus), size))
    bound = max(-(-sum(own <= chosen for own in holders) // len(chosen)) for chosen in some)
    assert max(balance.sends_per_gpu(moves)) == bound


def test_senders_take_turns_over_layers() -> None:
    """Each layer has one transfer, and two GPUs can send it."""
    previous = balance.placement_of_slots(torch.tensor([[0, 1, 0, 1, 2, 2]] * 4), num_experts=3)
    new = balance.placement_of_slots(torch.tensor([[0, 1, 0, 1, 2, 0]] * 4), num_experts=3)
    moves = balance.transfers(previous, new, 3)
    assert [move.layer for move in moves.transfers] == [0, 1, 2, 3]
    assert balance.sends_per_gpu(moves) == [2, 2, 0]
    assert moves.transfers[0] == Move(0, 0, 5)


def weights_of_slots(seed: int, experts: int, dtype: torch.dtype) -> MoEWeights:
    """Returns tensors with the experts in the first dim, and one without experts; random bits, NaN included."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)

    return MoEWeights(
        gate_up=bits(experts, 3, 5),
        down=bits(experts, 5, 1),
        gate_up_bias=bits(experts, 3),
        expert_norm=bits(experts, 1),
        constants=bits(2, 5),
    )


def part(weights: MoEWeights, gpu: int, gpus: int) -> MoEWeights:
    own = {
        name: getattr(weights, name).tensor_split(gpus)[gpu]
        for name in ("gate_up", "down", "gate_up_bias", "expert_norm")
    }
    return dataclasses.replace(weights, **own)


def same_bits(a: MoEWeights, b: MoEWeights) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs)


@law(st.tuples(placements(), st.integers(0, 2**20), st.sampled_from((torch.float32, torch.bfloat16, torch.float64))))
def test_moved_weights_are_the_weights_of_the_new_placement(
    case: tuple[tuple[Placement, Placement, int], int, torch.dtype],
) -> None:
    """All ranks in one process; test_eplb_ranks.py has real ones."""
    (previous, new, gpus), seed, dtype = case
    weights = weights_of_slots(seed, len(new.num_replicas), dtype)
    before, after = (balance.physical_weights(weights, placement) for placement in (previous, new))
    moves = balance.transfers(previous, new, gpus)
    own = [part(before, gpu, gpus) for gpu in range(gpus)]
    sent = [balance.move_weights.departing(own[gpu], moves, gpu) for gpu in range(gpus)]
    for gpu in range(gpus):
        moved = balance.move_weights.weights_after_moves(
            own[gpu], moves, gpu, [sent[other][gpu] for other in range(gpus)]
        )
        assert same_bits(moved, part(after, gpu, gpus))
        assert same_bits(own[gpu], part(before, gpu, gpus))
