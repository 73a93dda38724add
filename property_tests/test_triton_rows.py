"""The Triton kernels that sort slots, sum the rows of a token and compute small batches, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before the first import of triton", allow_module_level=True)

from moe_fn.config import ActivationConfig
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.triton import metadata
from moe_fn.kernels.triton.combine import gather_sum
from moe_fn.kernels.triton.metadata import sort_slots
from moe_fn.kernels.triton.slots import SortedSlots, TileMap, max_tiles, tiles_of_groups
from moe_fn.kernels.triton.small_batch import down_of_slots, up_of_slots
from moe_fn.kernels.triton.tiles import Tile
from moe_fn.stages._activation import activate
from moe_fn.testing import assert_matches
from moe_fn.testing.limits import TookTooLong, at_most_cpu_seconds

SEEDS = st.integers(0, 2**20)
DTYPES = st.sampled_from([torch.float32, torch.float16])  # the interpreter truncates bfloat16 where a GPU rounds
SITU = ActivationConfig(function="situ", gate_cap=2.0, up_cap=1.5)


@st.composite
def expert_ids(draw: DrawFn, most_tokens: int = 12, most_experts: int = 70) -> tuple[Tensor, int]:
    """Draws ids [T, k], some of no expert, or all of one expert, and the number of experts."""
    num_experts, top_k = draw(st.integers(1, most_experts)), draw(st.integers(1, 8))
    ids = st.one_of(st.integers(0, num_experts - 1), st.sampled_from([-1, num_experts, num_experts + 5, 0]))
    one = draw(st.one_of(st.none(), ids))
    rows = draw(st.lists(st.tuples(*[ids if one is None else st.just(one)] * top_k), max_size=most_tokens))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), top_k), num_experts


def sorted_in_torch(
    ids: Tensor, num_experts: int, tile_rows: tuple[int, ...]
) -> tuple[SortedSlots, tuple[TileMap, ...]]:
    """Returns the expected result of sort_slots."""
    flat = ids.flatten().to(torch.int64)
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    slot_of_row = key.sort(stable=True).indices
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(len(flat))
    row_of_slot[key == num_experts] = -1
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    slots = SortedSlots(slot_of_row.to(torch.int32), row_of_slot.to(torch.int32), starts.to(torch.int32), ids.shape[1])
    maps = []
    for rows in tile_rows:
        tiles = [(e, first) for e in range(num_experts) for first in range(int(starts[e]), int(starts[e + 1]), rows)]
        tiles += [(-1, -1)] * (max_tiles(len(flat), num_experts, rows) - len(tiles))
        expert, first_row = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2).unbind(1)
        maps.append(TileMap(expert, first_row, rows))
    return slots, tuple(maps)


def assert_same_order(
    actual: tuple[SortedSlots, tuple[TileMap, ...]], expected: tuple[SortedSlots, tuple[TileMap, ...]]
) -> None:
    for name in ("slot_of_row", "row_of_slot", "starts"):
        assert_matches(getattr(actual[0], name), getattr(expected[0], name), name=name)
    assert actual[0].top_k == expected[0].top_k and len(actual[1]) == len(expected[1])
    for one, other in zip(actual[1], expected[1], strict=True):
        assert one.rows == other.rows
        assert_matches(one.expert_of_tile, other.expert_of_tile, name="expert_of_tile")
        assert_matches(one.first_row_of_tile, other.first_row_of_tile, name="first_row_of_tile")


@given(expert_ids(), st.sampled_from([(), (16,), (64, 16), (16, 1, 128)]), st.sampled_from([16, 32]))
@settings(max_examples=25)
def test_both_forms_sort_as_torch_does(case: tuple[Tensor, int], tile_rows: tuple[int, ...], block: int) -> None:
    ids, num_experts = case
    expected = sorted_in_torch(ids, num_experts, tile_rows)
    assert_same_order(metadata.in_one_program(ids, num_experts, tile_rows), expected)
    assert_same_order(metadata.in_three_kernels(ids, num_experts, tile_rows, block), expected)


@pytest.mark.parametrize("num_tokens", [1, metadata.ONE_PROGRAM_SLOTS // 2 + 1])
def test_many_experts_and_slots(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(-1, 1000, (num_tokens, 2), generator=generator)
    assert_same_order(sort_slots(ids, 999, (16, 2)), sorted_in_torch(ids, 999, (16, 2)))


def test_the_scan_goes_on_from_chunk_to_chunk() -> None:
    """There are more blocks than one step of the scan reads."""
    ids = torch.randint(0, 3, (metadata.SCAN_BLOCKS * 2 + 40,), generator=torch.Generator().manual_seed(0)).unsqueeze(1)
    assert_same_order(metadata.in_three_kernels(ids, 3, (16,), block=2), sorted_in_torch(ids, 3, (16,)))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=9), st.sampled_from([1, 4, 16]))
def test_tiles_of_groups_are_the_groups_cut_in_tiles(groups: list[tuple[int, int]], tile_rows: int) -> None:
    """There are rows of no group between the groups."""
    ends = torch.tensor([0] + [size + gap for size, gap in groups]).cumsum(0)
    starts, ends = (
        ends[:-1].to(torch.int32),
        (ends[:-1] + torch.tensor([size for size, _ in groups], dtype=torch.int64)).to(torch.int32),
    )
    total = sum(size for size, _ in groups)
    tile_map = tiles_of_groups(starts, ends, total, tile_rows)
    expected = [(g, first) for g in range(len(groups)) for first in range(int(starts[g]), int(ends[g]), tile_rows)]
    expected += [(-1, -1)] * (max_tiles(total, len(groups), tile_rows) - len(expected))
    assert list(zip(tile_map.expert_of_tile.tolist(), tile_map.first_row_of_tile.tolist(), strict=True)) == expected
    assert (
        tile_map.expert_of_tile.dtype == tile_map.first_row_of_tile.dtype == torch.int32 and tile_map.rows == tile_rows
    )


@given(expert_ids(), st.integers(1, 40), st.sampled_from([None, 1000, 1040]), DTYPES, st.booleans(), SEEDS)
@settings(max_examples=30)
def test_gather_sum_is_the_weighted_sum_of_slots(
    case: tuple[Tensor, int], hidden: int, wide: int | None, dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    ids, num_experts = case
    check_gather_sum(ids, num_experts, wide or hidden, dtype, weighted, seed)


@pytest.mark.parametrize("weighted", [True, False])
def test_gather_sum_of_many_choices(weighted: bool) -> None:
    check_gather_sum(torch.arange(3 * 37).reshape(3, 37) % 5 - 1, 4, 33, torch.float32, weighted, 0)


def check_gather_sum(ids: Tensor, num_experts: int, hidden: int, dtype: torch.dtype, weighted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots, _ = sorted_in_torch(ids, num_experts, ())
    row = slots.row_of_slot.reshape(ids.shape).to(torch.int64)
    rows = torch.randn(ids.numel(), hidden, generator=generator).to(dtype)
    weights = torch.randn(ids.shape, generator=generator)
    expected = (
        rows.double()[row.clamp(min=0)]
        * torch.where(row >= 0, weights if weighted else 1.0, 0.0).double().unsqueeze(-1)
    ).sum(1)
    rows[int(slots.starts[-1]) :] = torch.nan  # rows and weights of no expert are not read
    weights = torch.where(row < 0, torch.nan, weights)
    actual = gather_sum(rows, slots.row_of_slot, weights if weighted else None, ids.shape[1], dtype)
    assert_matches(actual, expected.to(dtype), name="gather_sum")


def decode_problem(
    case: tuple[Tensor, int],
    inner: int,
    columns: int,
    dtype: torch.dtype,
    transposed: bool,
    bias: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns strided weights [E, inner, columns] and their bias, NaN for experts without slots, and both in
    float64 for the expert of each slot.
    """
    ids, num_experts = case
    flat = ids.flatten().to(torch.int64)
    expert = torch.where(flat < num_experts, flat, 0).clamp(min=0)
    unused = torch.tensor([e not in flat.tolist() for e in range(num_experts)])
    shape = (num_experts, columns, inner) if transposed else (num_experts, inner, columns)
    weight = (torch.randn(shape, generator=generator) * inner**-0.5).to(dtype)
    biases = torch.randn(num_experts, columns, generator=generator).to(dtype)
    own = (weight.mT if transposed else weight).double()[expert]
    own_bias = biases.double()[expert] if bias else torch.zeros(len(flat), columns, dtype=torch.float64)
    weight = torch.where(unused.reshape(-1, 1, 1), torch.nan, weight)
    biases = torch.where(unused.reshape(-1, 1), torch.nan, biases)
    return weight.mT if transposed else weight, biases if bias else None, own, own_bias


TILES = st.sampled_from([Tile(4, 16, 32, 1, 1), Tile(2, 32, 16, 1, 3), Tile(8, 8, 64, 1, 2)])


@given(
    expert_ids(3, 9),
    st.integers(1, 50),
    st.integers(1, 21),
    DTYPES,
    st.sampled_from([*PRESETS.values(), SITU]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    TILES,
    SEEDS,
)
@settings(max_examples=25)
def test_up_of_slots_is_the_up_projection(
    case: tuple[Tensor, int], hidden: int, intermediate: int, dtype: torch.dtype, activation: ActivationConfig,
    options: tuple[bool, bool, bool], tile: Tile, seed: int,
) -> None:  # fmt: skip
    (ids, num_experts), (transposed, bias, interleaved) = case, options
    interleaved = interleaved and activation.gated
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ids.shape[0], hidden, generator=generator).to(dtype)
    columns = 2 * intermediate if activation.gated else intermediate
    weight, biases, own, own_bias = decode_problem(case, hidden, columns, dtype, transposed, bias, generator)
    h = torch.einsum("sh,shn->sn", x.double().repeat_interleave(ids.shape[1], 0), own)
    expected = activate(activation, h + own_bias, "interleaved" if interleaved else "packed")
    actual = up_of_slots(x, ids, weight, biases, activation, interleaved, tile)
    valid = ((ids >= 0) & (ids < num_experts)).flatten()
    assert actual.shape == expected.shape
    assert_matches(actual[valid], expected[valid].to(dtype), name="activated")


@given(
    expert_ids(3, 9),
    st.integers(1, 50),
    st.integers(1, 40),
    DTYPES,
    st.tuples(st.booleans(), st.booleans()),
    TILES,
    SEEDS,
)
@settings(max_examples=25)
def test_down_of_slots_is_the_down_projection_and_the_sum(
    case: tuple[Tensor, int],
    intermediate: int,
    hidden: int,
    dtype: torch.dtype,
    options: tuple[bool, bool],
    tile: Tile,
    seed: int,
) -> None:
    ids, num_experts = case
    generator = torch.Generator().manual_seed(seed)
    valid = (ids >= 0) & (ids < num_experts)
    activated = torch.randn(ids.numel(), intermediate, generator=generator).to(dtype)
    weights = torch.randn(ids.shape, generator=generator)
    weight, biases, own, own_bias = decode_problem(case, intermediate, hidden, dtype, *options, generator)
    y = (torch.einsum("si,sih->sh", activated.double(), own) + own_bias) * torch.where(
        valid, weights, 0.0
    ).double().reshape(-1, 1)
    expected = y.reshape(*ids.shape, hidden).sum(1)
    activated[~valid.flatten()] = torch.nan
    weights = torch.where(valid, weights, torch.nan)
    actual = down_of_slots(activated, ids, weights, weight, biases, dtype, tile)
    assert_matches(actual, expected.to(dtype), name="y")


@triton.jit
def endless(out, n):  # type: ignore[no-untyped-def]
    i = 0
    while i < n:
        i += 0


def test_a_kernel_that_never_ends_fails_by_name_and_is_not_tried_again() -> None:
    runs = []

    @given(st.integers(1, 9))
    @settings(max_examples=3)
    def law(n: int) -> None:
        runs.append(n)
        endless[(1,)](torch.zeros(1), n)

    with pytest.raises(TookTooLong, match="endless"), at_most_cpu_seconds(0.3, "endless"):
        law()
    assert len(runs) == 1
