"""The tile heuristics: tiles are legal, fit the device, depend only on the arguments, and are compiled ahead
of time.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moe_fn.bench import sweep
from moe_fn.bench.models import MODELS, Model, model_of_shape
from moe_fn.bench.sweep import Measured, best_tile, candidates, table_rows
from moe_fn.config import as_activation
from moe_fn.kernels.triton.tile_tables import ARCHITECTURES, TABLES, Tile, rows_of
from moe_fn.kernels.triton.tiles import (
    architecture_of,
    architecture_of_capability,
    decode_down_tile,
    decode_up_tile,
    divisible,
    down_backward_tile,
    outer_tile,
    product_tile,
    shared_memory,
    tiles_of,
    up_tile,
)

HEURISTICS = {"up": up_tile, "product": product_tile, "down_backward": down_backward_tile, "outer": outer_tile}
ARCHS = st.sampled_from(sorted(ARCHITECTURES))
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BYTES = st.sampled_from((2, 4))


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@given(
    kind=st.sampled_from(sorted(HEURISTICS)),
    tokens=st.one_of(st.integers(0, 64), st.integers(0, 1 << 24)),
    experts=st.integers(1, 1024),
    top_k=st.integers(1, 32),
    inner=st.integers(1, 1 << 16),
    columns=st.integers(1, 1 << 16),
    dtype_bytes=BYTES,
    arch=ARCHS,
)
@example(kind="up", tokens=0, experts=1, top_k=1, inner=1, columns=1, dtype_bytes=4, arch="gfx942")
@example(kind="up", tokens=4096, experts=8, top_k=8, inner=4096, columns=28672, dtype_bytes=2, arch="sm_75")
def test_any_sizes_get_a_tile_that_fits_the_device(
    kind: str, tokens: int, experts: int, top_k: int, inner: int, columns: int, dtype_bytes: int, arch: str
) -> None:
    sizes = (tokens * top_k, experts, inner, columns, dtype_bytes, arch)
    tile = HEURISTICS[kind](*sizes)
    assert all(power_of_two(number) for number in (tile.rows, tile.columns, tile.inner, tile.warps))
    assert min(tile.rows, tile.columns, tile.inner) >= 16
    assert tile.stages >= 1
    assert shared_memory(tile, dtype_bytes, arch) <= ARCHITECTURES[arch].shared_memory
    assert tile.columns < 2 * max(columns, 16), "more than half of every tile would be masked"
    assert HEURISTICS[kind](*sizes) == tile
    if min(inner, columns) >= 256:
        assert tile in tiles_of(kind, dtype_bytes, arch, odd=not divisible(inner, columns))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_published_models_get_tiles_that_are_compiled_ahead_of_time(model: Model, arch: str) -> None:
    config = model.config
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    columns = 2 * inner if as_activation(config.activation).gated else inner
    for tokens in (1, 2, 3, 7, 16, 33, 64, 100, 128, 256, 512, 1000, 2048, 4096, 16384, 100_000):
        for dtype_bytes in (2, 4):
            rows = tokens * config.top_k
            found = (
                ("up", up_tile(rows, experts, hidden, columns, dtype_bytes, arch)),
                ("product", product_tile(rows, experts, inner, hidden, dtype_bytes, arch)),
                ("product", product_tile(rows, experts, columns, hidden, dtype_bytes, arch)),
                ("down_backward", down_backward_tile(rows, experts, hidden, inner, dtype_bytes, arch)),
                ("outer", outer_tile(rows, experts, hidden, columns, dtype_bytes, arch)),
                ("outer", outer_tile(rows, experts, inner, hidden, dtype_bytes, arch)),
            )
            for kind, tile in found:
                assert tile in tiles_of(kind, dtype_bytes, arch), f"{kind} of {model.name} at {tokens} tokens"


@given(rows=st.integers(1, 1 << 20), experts=st.integers(1, 512), dtype_bytes=BYTES, arch=ARCHS)
def test_more_rows_an_expert_never_make_fewer_rows_a_tile(rows: int, experts: int, dtype_bytes: int, arch: str) -> None:
    for kind in ("up", "product", "down_backward"):
        few, many = (HEURISTICS[kind](count, experts, 4096, 4096, dtype_bytes, arch) for count in (rows, 2 * rows))
        assert few.rows <= many.rows


def test_the_tables_are_whole_and_in_order() -> None:
    """Each architecture has rows for both sizes of elements, sorted by rows per expert, and the last row has
    no limit.
    """
    for kind in TABLES:
        for arch in ARCHITECTURES:
            for dtype_bytes in (2, 4):
                mosts = [most for most, _ in rows_of(kind, dtype_bytes, arch)]
                assert mosts == sorted(mosts) and mosts[-1] == float("inf"), f"{kind} {arch} {dtype_bytes}"


def test_a_step_divides_the_sum_where_half_of_it_does() -> None:
    """gpt-oss has 2880 = 45 x 64, and a step of 128 would mask every load."""
    assert product_tile(512, 128, 2880, 2880, 2, "sm_90").inner == 64
    assert product_tile(512, 128, 2048, 2880, 2, "sm_90").inner == 128


@given(
    top_k=st.integers(1, 64),
    inner=st.integers(1, 1 << 16),
    columns=st.integers(1, 1 << 16),
    dtype_bytes=BYTES,
    arch=ARCHS,
)
def test_decode_tiles_are_powers_of_two_and_no_larger_than_the_matrices(
    top_k: int, inner: int, columns: int, dtype_bytes: int, arch: str
) -> None:
    for in_out in (False, True):
        up = decode_up_tile(top_k, 128, inner, columns, dtype_bytes, arch, in_out=in_out)
        down = decode_down_tile(top_k, 128, inner, columns, dtype_bytes, arch, in_out=in_out, top_k=top_k)
        for tile in (up, down):
            assert all(power_of_two(number) for number in (tile.rows, tile.columns, tile.inner, tile.warps))
            assert tile.inner < 2 * max(inner, 16) and tile.columns < 2 * max(columns, 16)
        assert arch == "interpreter" or down.rows < 2 * top_k or down.rows <= 4


def test_small_grids_get_narrow_tiles() -> None:
    narrow, wide = (up_tile(rows, 8, 4096, 28672, 2, "sm_90") for rows in (2, 8))
    assert product_tile(2, 8, 14336, 4096, 2, "sm_90").columns == 32
    assert narrow.columns <= wide.columns


def test_elements_of_eight_bytes_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="elements of 8 bytes on sm_90; expected 2 or 4"):
        up_tile(16, 4, 64, 64, 8, "sm_90")


def test_architectures() -> None:
    assert architecture_of(torch.device("cpu")) == "interpreter"
    for major in range(7, 14):
        for minor in range(10):
            assert architecture_of_capability(major, minor) in ARCHITECTURES
    assert [field.name for field in dataclasses.fields(Tile)] == ["rows", "columns", "inner", "warps", "stages"]


@given(kind=st.sampled_from(sorted(TABLES)), dtype_bytes=BYTES, arch=st.sampled_from(TARGETS), data=st.data())
def test_candidates_of_the_sweep_fit_and_are_neighbours(
    kind: str, dtype_bytes: int, arch: str, data: st.DataObject
) -> None:
    chosen = data.draw(st.sampled_from([tile for _, tile in rows_of(kind, dtype_bytes, arch)]))
    found = candidates(kind, chosen, dtype_bytes, arch)
    assert found[0] == chosen and len(set(found)) == len(found) > 5
    for tile in found[1:]:
        assert (
            1 <= sum(a != b for a, b in zip(dataclasses.astuple(tile), dataclasses.astuple(chosen), strict=True)) <= 2
        )
        assert (
            all(power_of_two(number) for number in (tile.rows, tile.columns, tile.inner, tile.warps))
            and tile.stages >= 1
        )
        assert kind.startswith("decode") or shared_memory(tile, dtype_bytes, arch) <= ARCHITECTURES[arch].shared_memory


OLD, NEW, NARROW = Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)


def test_a_tile_replaces_the_tables_only_if_it_clearly_wins_everywhere_together() -> None:
    def best(*times: tuple[float, float]) -> Tile:
        return best_tile([Measured("up", 32.0, OLD, {OLD: old, NEW: new}) for old, new in times])

    assert best((1.0, 0.9)) == NEW
    assert best((1.0, 0.98)) == OLD, "within the noise"
    assert best((1.0, 0.8), (1.0, 1.3)) == OLD
    assert best_tile([Measured("up", 32.0, OLD, {OLD: 1.0}), Measured("up", 32.0, OLD, {OLD: 1.0, NEW: 0.5})]) == OLD, (
        "not timed twice"
    )


def test_the_sweep_prints_rows_of_the_tables() -> None:
    measured = [
        Measured("up", 8.0, NARROW, {NARROW: 1.0, OLD: 2.0}),
        Measured("up", 32.0, OLD, {OLD: 1.0, NEW: 1.1, NARROW: 0.5}),
        Measured("up", 128.0, OLD, {OLD: 1.0, NEW: 0.5}),
    ]
    text = table_rows(measured, "sm_90", 2)
    assert text.splitlines() == [
        "# up",
        '("sm_90", 2, 64, Tile(64, 64, 64, 4, 3)),',
        '("sm_90", 2, math.inf, Tile(128, 128, 64, 8, 3)),',
    ]
    rows = eval("(" + "".join(text.splitlines()[1:]) + ")", {"Tile": Tile, "math": math})
    assert [most for *_, most, _ in rows] == [64, math.inf]


def test_the_sweep_refuses_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for arguments, words in (
        ([], "torch finds none"),
        (["--model", "gpt"], "--model gpt: expected some of"),
        (["--tokens", "a"], "'a'"),
    ):
        with pytest.raises(SystemExit):
            sweep.main(arguments)
        assert words in capsys.readouterr().err


def test_the_sweep_runs_every_kernel_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep times the kernels that it names; on a CPU the times have no meaning."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("start pytest with TRITON_INTERPRET=1")
    monkeypatch.setattr(
        sweep, "candidates", lambda kind, chosen, *about: (chosen, dataclasses.replace(chosen, columns=16))
    )
    times = iter(range(1, 10_000))
    measured = sweep.measure(
        model_of_shape("16,1,32,16"),
        4,
        torch.float32,
        torch.device("cpu"),
        lambda run: (run(), float(next(times)))[1],
        0.0,
    )
    kinds = [one.kind for one in measured]
    assert kinds == ["up", "product", "down_backward", "outer", "decode_up", "decode_down"]
    assert all(one.chosen in one.times and min(one.times.values()) > 0 for one in measured)
