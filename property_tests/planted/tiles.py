"""Planted bugs of the C++ kernels' AMX tiles: each must break the test that it names, at the level with emulated tiles
or at the one whose tile instructions are trapped.
"""

from functools import partial

from moe_fn.kernels.native import library as native
from planted.cpp import OUTER, CppBug

BITS, PREPARED, DENORMALS, SAME_TOKEN = (
    "test_native_amx.test_bits_of_a_row_do_not_depend_on_other_rows_or_the_layout_of_weights",
    "test_native_amx.test_prepared_and_plain_weights_have_the_same_bits",
    "test_native_amx.test_denormals_are_zero",
    "test_quant_native.test_the_bits_of_a_token_do_not_depend_on_the_others",
)
Emulated = partial(CppBug, level=native.EMULATED_AMX)
Compiled = partial(CppBug, level="amx")

BUGS = (
    Emulated(
        BITS,
        "the second half of a panel is its first half",
        "amx.h",
        "_tile_loadd(7, w + SECOND, PITCH);",
        "_tile_loadd(7, w, PITCH);",
    ),
    Emulated(
        BITS,
        "rows 16 to 31 are rows 0 to 15",
        "amx.h",
        "_tile_loadd(5, x + 16 * CHUNK, 64);",
        "_tile_loadd(5, x, 64);",
    ),
    Emulated(
        BITS,
        "a last chunk of steps is left out",
        "amx.h",
        "if (const int rest = steps % CHUNK) {",
        "if (const int rest = 0) {",
    ),
    Emulated(
        BITS,
        "sums of earlier blocks of steps are lost",
        "amx.h",
        "  if (add) {",
        "  if (false) {",
    ),
    Emulated(
        BITS,
        "sums of the lower right tile are those of the lower left one",
        "amx.h",
        "_tile_loadd(3, c + LOWER + SECOND, PITCH);",
        "_tile_loadd(3, c + LOWER, PITCH);",
    ),
    Emulated(
        PREPARED,
        "a last chunk of a prepared panel is multiplied with the next panel",
        "amx.h",
        "products(a, last);",
        "products(a, b);",
    ),
    Emulated(
        BITS,
        "rows that a tile adds to a block overwrite sums of the next panel",
        "product.h",
        "padded_rows = round_up(int(total), ROWS_TOGETHER<D>);",
        "padded_rows = total;",
    ),
    Emulated(
        BITS,
        "rows that a tile adds to a block overwrite sums of the next strip",
        "stream.h",
        "of_strip(round_up(int(rows), ROWS_TOGETHER<D>) * STRIP<D>)",
        "of_strip(rows * STRIP<D>)",
    ),
    Emulated(
        OUTER,
        "outer products run without a configuration of tiles",
        "kernels.h",
        "[[maybe_unused]] const Region<D> region;",
        "",
    ),
    Emulated(
        DENORMALS,
        "denormal results are kept",
        "emulated_amx.h",
        "return std::fabs(scaled) < SMALLEST * SCALE ? std::copysign(0.f, scaled) : result;",
        "return result;",
    ),
    Emulated(
        DENORMALS,
        "results are flushed that are denormal before rounding only",
        "emulated_amx.h",
        "return std::fabs(scaled) < SMALLEST * SCALE ? std::copysign(0.f, scaled) : result;",
        "return std::fabs(result) < SMALLEST ? std::copysign(0.f, result) : result;",
    ),
    Emulated(
        DENORMALS,
        "denormal operands are kept",
        "emulated_amx.h",
        "return std::fabs(x) < SMALLEST ? std::copysign(0.f, x) : x; }",
        "return x; }",
    ),
    Emulated(
        SAME_TOKEN,
        "bytes of every span are multiplied with the first one's weights",
        "quantized.h",
        "scratch + int64_t(first) * PANEL, span.count",
        "scratch, span.count",
    ),
    Emulated(
        SAME_TOKEN,
        "sums of x of the first span correct every span of bytes",
        "quantized.h",
        "extra + int64_t(1 + i) / CHUNK * n * CHUNK + (1 + i) % CHUNK;",
        "extra + 1;",
    ),
    Emulated(
        SAME_TOKEN,
        "spans shorter than a tile are multiplied by tiles",
        "quantized.h",
        "for (const Span& span : w.codes->spans)",
        "for (const Span& span : {Span{0, 0, 0}})",
    ),
    Compiled(
        BITS,
        "tiles of rows have fewer rows than tiles of sums",
        "amx.h",
        "uint8_t rows[16] = {16, 16, 16, 16, 16,",
        "uint8_t rows[16] = {16, 16, 16, 16, 8,",
    ),
    Compiled(
        BITS,
        "tiles are not released",
        "amx.h",
        "~TileRegion() { _tile_release(); }",
        "~TileRegion() {}",
    ),
    Compiled(
        BITS,
        "a ninth tile is configured",
        "amx.h",
        "bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};",
        "bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64, 64};",
    ),
)
