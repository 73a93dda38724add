"""Cases of ahead_of_time for quantized weights: each granularity of scales, each way to decode, each form of
activations, in every tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from compile_tests.ahead_of_time.case import Case
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.triton import up
from moe_fn.kernels.triton.quant import inputs, products
from moe_fn.kernels.triton.quant import up as quant_up
from moe_fn.kernels.triton.quant.inputs import CASTS_E4M3
from moe_fn.kernels.triton.quant.tiles import plainer, rows_of_coded, swaps
from moe_fn.kernels.triton.support import NO_E4M3
from moe_fn.kernels.triton.tile_tables import Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAPS = ("slot_of_row", "starts", "ends", "expert_of_tile", "first_row_of_tile")
FLOATS = ("left_scale", "factor", "out_scale")
COUNTS = ("row_tiles", "half_rows", "tile_out", "in_tiles", "left_groups", "out_groups")  # not multiples of 16
SIZES = ("K", "N", "H", "I", "half_columns")


@dataclass(frozen=True, kw_only=True)
class Form:
    """A scheme, the number of inputs that share a scale (None: all), and the format of the left operand."""

    scheme: str
    inputs: int | None = None
    scale: str = "float"  # "e8m0", "e4m3"
    left: str | None = None
    zero: bool = False
    above: bool = False  # whether there is a global scale
    even: bool = True
    odd: bool = False  # rows of codes whose bytes are not a multiple of 16

    @property
    def name(self) -> str:
        """The name of the case."""
        words = [
            self.scheme,
            "outer" if self.inputs is None else str(self.inputs),
            "" if self.left is None else f"x {self.left}",
        ]
        return " ".join(
            word
            for word in (*words, "zero" if self.zero else "", "" if self.even else "masked", "odd" if self.odd else "")
            if word
        )


# Every granularity of scales and every way to decode. The first is compiled in all tiles, the others in the last one.
DECODED = (
    Form(scheme="int4", inputs=128, zero=True),
    Form(scheme="int4", inputs=32, zero=True, even=False, odd=True),
    Form(scheme="e2m1", inputs=32, scale="e8m0"),
    Form(scheme="e2m1", inputs=16, scale="e4m3", above=True),
    Form(scheme="int8", even=False),
    Form(scheme="fp8_e4m3", inputs=128),
)
CODED = (
    Form(scheme="fp8_e4m3", inputs=128, left="group"),
    Form(scheme="fp8_e4m3", left="row"),
    Form(scheme="fp8_e4m3", left="expert"),
    Form(scheme="int8", left="row"),
)


def quant_cases(arch: str, thorough: bool = False) -> Iterator[Case]:
    """Yields all cases for an architecture; thorough: every form in every tile, and in half of its columns, which takes
    some minutes.
    """
    for family, forms in (("decoded", DECODED), ("coded", CODED)):
        for form in forms:
            if form.left is not None and form.scheme == "fp8_e4m3" and arch in NO_E4M3:
                continue
            first = form == forms[0]
            yield from _in_tiles("up", arch, form, f"{family}_up", first, thorough)
            if thorough or first:
                yield from _in_tiles("product", arch, form, f"{family}_product", False, thorough)
    for form in DECODED if thorough else DECODED[1:2]:
        yield from (quant_case("up", arch, form, tile, "fp32") for _, tile in rows_of_coded("decoded_up", 4, arch)[-1:])
    yield quant_case(
        "up", arch, DECODED[0], rows_of_coded("decoded_up", 2, arch)[-1][1], keep=True, activation="swigluoai"
    )
    yield from (
        quantize_case(form, code)
        for form, code in (("row", "i8"), ("group", "fp8e4nv"))
        if code == "i8" or arch not in NO_E4M3
    )


def _in_tiles(kind: str, arch: str, form: Form, table: str, both: bool, thorough: bool) -> Iterator[Case]:
    """Yields a form in all tiles of a table, in the last ones with four and with eight warps, or in the last one, which
    is for most rows.
    """
    tiles = [tile for _, tile in rows_of_coded(table, 1 if form.left else 2, arch)]
    heaviest = list({tile.warps: tile for tile in tiles}.values())
    for tile in tiles if thorough else heaviest if both else tiles[-1:]:
        yield quant_case(kind, arch, form, tile)
        if thorough and tile.columns > 64:
            yield quant_case(kind, arch, form, replace(tile, columns=tile.columns // 2))


def quant_case(
    kind: str, arch: str, form: Form, tile: Tile, dtype: str = "bf16", keep: bool = False, activation: str = "silu"
) -> Case:
    """Returns a case of one of the two products; a tile of 256 columns stores its groups of codes itself."""
    kernel: Any = quant_up._up_kernel if kind == "up" else products._product_kernel
    codes = {"fp8_e4m3": "*fp8e4nv", "int8": "*i8"}.get(form.scheme, "*u8")
    payload = codes if form.left is not None or (form.scheme == "fp8_e4m3" and arch in CASTS_E4M3) else "*u8"
    left = f"*{dtype}" if form.left is None else codes
    width = DTYPES[dtype].itemsize
    tile = plainer(tile, width) if form.odd else tile
    tile = replace(tile, inner=min(tile.inner, form.inputs)) if form.left and form.inputs else tile
    stored = {"expert": "expert", "group": "group" if tile.columns == 256 else None}.get(form.left or "")
    place = "outer" if form.inputs is None else "step" if form.inputs % tile.inner == 0 else "inner"
    swap = swaps(tile, 1 if form.left else width)
    config = PRESETS[activation]
    types = {
        **dict.fromkeys(("rows", "x"), left), **dict.fromkeys(("bias", "out", "pre"), f"*{dtype}"),
        **dict.fromkeys(MAPS, "*i32"),
        **dict.fromkeys(FLOATS, "*fp32"), **dict.fromkeys((*COUNTS, *SIZES), "i32"), "payload": payload, "zero": "*u8",
        "scale": "*fp32" if form.scale == "float" else "*u8", "activated": codes if stored else f"*{dtype}",
    }  # fmt: skip
    constants = {
        "SCHEME": form.scheme, "PLACE": place, "SCALE_FORM": form.scale, "TILE_IN": form.inputs or 1, "ZERO": form.zero,
        "GLOBAL": form.above, "LEFT": form.left, "LEFT_GROUP": form.inputs or 1, "SWAP": swap,
        "TOP_K": 8, "BIAS": keep, "KEEP": keep, "EVEN": form.even, "INTERLEAVED": keep, "GROUP": 8, "OUT_FORM": stored,
        "POWER_OF_TWO": False, "MOST": 448.0, "AS": quant_up.ELEMENTS[DTYPES[dtype]], "ACTIVATION": config,
        "BM": tile.rows, "BN": tile.columns, "BK": tile.inner,
        "PIECES": 1 if stored else up.pieces_of(tile, config.gated), "VECTOR": 16,
    }  # fmt: skip
    names = set(kernel.arg_names)
    sizes = f"{tile.rows}x{tile.columns}x{tile.inner} w{tile.warps} s{tile.stages}"
    return Case(
        name=f"quant {kind} {dtype} {sizes} {form.name}{' keep' if keep else ''}",
        kernel=kernel,
        types={name: type for name, type in types.items() if name in names},
        constants={name: value for name, value in constants.items() if name in names},
        warps=tile.warps,
        stages=tile.stages,
        tile=replace(tile, rows=tile.columns) if swap else tile,  # the dimension in which the matrix unit has 64
        dtype=dtype,
        # Triton uses only mma.sync for int8 there
        product=not (form.scheme == "int8" and form.left and arch == "sm_100"),
        unaligned=frozenset((*COUNTS, *(SIZES if form.odd else ()), "ends")) & names,
    )


def quantize_case(form: str, code: str) -> Case:
    """Returns a case that quantizes rows of 4096 values, by row or by groups of 128."""
    constants = {
        "FORM": form, "SPAN": 4096 if form == "row" else 128, "SPANS": 1 if form == "row" else 32,
        "POWER_OF_TWO": form == "group",
        "TOP_K": 1, "MOST": 127.0 if code == "i8" else 448.0, "LINES": 1 if form == "row" else 8,
        "WIDTH": 1024 if form == "row" else 128,
        "slot_of_row": None, "expert_ids": None,
    }  # fmt: skip
    types = {
        "x": "*bf16",
        "out": f"*{code}",
        "scale": "*fp32",
        **dict.fromkeys(("lines", "K", "num_experts", "stride_x"), "i32"),
    }
    return Case(
        name=f"quantize {form} {code}", kernel=inputs._quantize_kernel, types=types, constants=constants, warps=4,
        stages=3,
        unaligned=frozenset(("lines", "num_experts")),
    )  # fmt: skip
