"""The cases of ahead_of_time: every kernel, every tile that the heuristics can choose, and options that change the
code.
"""

import random
from collections.abc import Iterator
from typing import Any

from compile_tests.ahead_of_time.case import Case
from compile_tests.ahead_of_time.quant_cases import quant_cases
from compile_tests.ahead_of_time.signatures import GROUPED, ODD_VARIANTS, ROWS, VARIANTS, Options
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.triton import down_backward, up
from moe_fn.kernels.triton.tile_tables import Tile, rows_of
from moe_fn.kernels.triton.tiles import (
    divisible,
    down_backward_tile,
    outer_tile,
    product_tile,
    shared_memory,
    tiles_of,
    up_tile,
)

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEURISTICS = {"up": up_tile, "product": product_tile, "down_backward": down_backward_tile, "outer": outer_tile}
FLAGS = ("BIAS", "KEEP", "INTERLEAVED", "GATHER", "INDIRECT", "GATHER_LEFT", "GATHER_RIGHT")


def cases_of(arch: str, planted: bool = False, thorough: bool = False) -> Iterator[Case]:
    """Yields all cases for an architecture; thorough: quantized weights in all tiles.

    planted: tiles with known faults instead, to test the check itself.
    """
    if planted:
        yield grouped_case("product", arch, Tile(128, 256, 64, 4, 4), "bf16", {})  # spills on NVIDIA
        yield grouped_case("product", arch, Tile(128, 256, 64, 8, 8), "bf16", {})  # 344,064 to 393,216 bytes of buffers
        return
    for kind, variants in VARIANTS.items():
        rows = [tile for _, tile in rows_of(kind, 2, arch)]
        # the last row with four and with eight warps, where options matter most
        heaviest = {tile.warps: tile for tile in rows}.values()
        for tile in _in_order(tiles_of(kind, 2, arch)):
            for options in variants if tile in heaviest else variants[:1]:
                yield grouped_case(kind, arch, tile, "bf16", options)
        yield grouped_case(kind, arch, rows[-1], "fp16", variants[0])
        for tile in _in_order(tiles_of(kind, 4, arch)):
            yield grouped_case(kind, arch, tile, "fp32", variants[1])
    for kind, variants in ODD_VARIANTS.items():
        for options in variants:
            for tile in _in_order(tiles_of(kind, 2, arch, odd=True)):
                yield grouped_case(kind, arch, tile, "bf16", options)
            yield grouped_case(kind, arch, _in_order(tiles_of(kind, 4, arch, odd=True))[-1], "fp32", options)
    for kind in ("decode_down", "decode_down_in_out"):
        widest = max(tiles_of(kind, 2, arch), key=lambda tile: tile.rows)
        yield grouped_case(kind, arch, widest, "bf16", {"TOP_K": 10})  # more choices than are loaded at once
    yield from _small_cases(arch)
    yield from _row_cases()
    yield from quant_cases(arch, thorough)


def _in_order(tiles: frozenset[Tile]) -> list[Tile]:
    return sorted(tiles, key=lambda tile: (tile.rows, tile.columns, tile.inner, tile.warps, tile.stages))


def _small_cases(arch: str, count: int = 12) -> Iterator[Case]:
    """Yields tiles of matrices smaller than the tiles of the tables, drawn with a fixed seed."""
    draw = random.Random(0)
    for number in range(count):
        kind, dtype = draw.choice(sorted(HEURISTICS)), draw.choice(("bf16", "fp32"))
        experts, inner, columns = (draw.randint(1, most) for most in (64, 255, 255))
        rows = experts * draw.choice((1, 6, 12, 40, 90, 1000))
        tile = HEURISTICS[kind](rows, experts, inner, columns, BYTES[dtype], arch)
        odd: Options = {} if divisible(inner, columns) else {"odd": True}
        yield grouped_case(
            kind, arch, tile, dtype, {**odd, "small": number, **({"KEEP": True} if kind == "up" else {})}
        )


def _row_cases() -> Iterator[Case]:
    """Yields the kernels without a tile."""
    for name, signature in ROWS.items():
        for dtype in ("bf16", "fp32") if signature.data else ("int32",):
            yield Case(
                name=f"{name} {dtype}",
                kernel=signature.kernel,
                types=signature.types(dtype),
                constants=signature.constants,
                warps=signature.warps,
                stages=3,
                dtype=dtype,
                unaligned=frozenset(signature.unaligned.split()),
                fusion=not name.startswith("route"),
            )


def grouped_case(kind: str, arch: str, tile: Tile, dtype: str, options: Options) -> Case:
    """Returns a case of a kernel with a tile of the heuristics and options."""
    signature = GROUPED[kind]
    types = signature.types(dtype) | ({"out": f"*{options['out']}"} if "out" in options else {})
    fixed: dict[str, Any] = {}
    if "stride_in" in signature.kernel.arg_names:
        contiguous, other = (
            ("stride_out", "stride_in") if options.get("in_out", "in_out" in kind) else ("stride_in", "stride_out")
        )
        types, fixed = {**types, other: "i32"}, {contiguous: 1}
    config = PRESETS[options.get("activation", "silu")]
    possible = {**dict.fromkeys(FLAGS, False), "ACTIVATION": config}
    possible |= _of_tile(kind, tile, config.gated, config.gated and options.get("INTERLEAVED", False))
    possible |= {"EVEN": "odd" not in options, "VECTOR": 1 if "odd" in options else 16, "STORE_ACTIVATED": True}
    possible |= {name: value for name, value in options.items() if name.isupper()}
    names = set(signature.kernel.arg_names) - set(types)
    sizes = frozenset(name for name, type in types.items() if not type.startswith("*"))
    words = [key.lower() if value is True else f"{key.lower()}={value}" for key, value in options.items()]
    matrix_unit = not kind.startswith("decode")
    return Case(
        name=" ".join((kind, dtype, f"{tile.rows}x{tile.columns}x{tile.inner} w{tile.warps} s{tile.stages}", *words)),
        kernel=signature.kernel,
        types=types,
        constants={name: value for name, value in possible.items() if name in names}
        | dict(signature.constants)
        | fixed,
        warps=tile.warps,
        stages=tile.stages if matrix_unit else 3,
        tile=tile,
        dtype=dtype,
        product=matrix_unit,
        unaligned=frozenset(signature.unaligned.split()) | (sizes if "odd" in options else frozenset()),
        bound=shared_memory(tile, BYTES[dtype], arch) if matrix_unit else 1 << 30,
    )


def _of_tile(kind: str, tile: Tile, gated: bool, interleaved: bool) -> dict[str, int]:
    """Returns the tile as constants of the kernels."""
    pieces = up.pieces_of(tile, gated) if kind == "up" else down_backward.pieces_of(tile, interleaved)
    grouped = {"BM": tile.rows, "BN": tile.columns, "BK": tile.inner, "PIECES": pieces}
    return {
        **grouped,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "STAGES": tile.stages,
        "CHOICES": tile.rows,
        "TOP_K": tile.rows,
    }
