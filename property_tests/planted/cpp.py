"""Planted bugs of the C++ kernels: each must break the test that it names.

Each is compiled, so only `make test-thorough` runs them.
"""

from dataclasses import dataclass

from tools.copied_tree import place_of
from tools.cpp_changes import LEVEL, Change

from moe_fn.kernels.native import library as native


@dataclass(frozen=True)
class CppBug:
    """`old`, which occurs once in `file`, is replaced by `new`; then `test`, "module.function", fails at `level`."""

    test: str
    what: str
    file: str
    old: str
    new: str
    level: str = LEVEL

    @property
    def change(self) -> Change:
        """The bug as a change of one line."""
        text = (native.SOURCES / self.file).read_text()
        line = text[: place_of(self.old, text, f"{self.what}: {self.file}")].count("\n")
        return Change(self.file, line, text.split("\n")[line].replace(self.old, self.new))


MANY, GRADIENTS = (
    "test_native_backward.test_gradients_of_more_rows_than_a_block_or_a_chunk",
    "test_native_backward.test_gradients_of_every_level",
)
OUTER, SEGMENTS = (
    "test_native_backward.test_outer_products_of_many_rows",
    "test_native_backward.test_outer_products_of_segments",
)
LIMITS = "test_native_backward.test_slopes_at_the_very_limits_and_kinks"
FORWARD, FEW = (
    "test_native.test_every_level_equals_the_reference",
    "test_native.test_few_and_many_rows_of_weights_kept_in_out",
)
HALVES = "test_native.test_every_float16_is_read_and_products_are_rounded_to_nearest"
REFUSED = "test_native.test_wrong_shapes_raise_in_words"
PRODUCTS, CODES = (
    "test_native.test_grouped_products_of_every_level",
    "test_quant_native.test_every_level_equals_the_reference",
)

BUGS = (
    # gradients
    CppBug(
        OUTER,
        "blocks of steps of an outer product overwrite each other",
        "kernels.h",
        "sum.get(), k > 0,",
        "sum.get(), false,",
    ),
    CppBug(
        MANY,
        "blocks of steps of a weight's gradient overwrite each other",
        "kernels.h",
        "sum.get(), k > 0,",
        "sum.get(), false,",
    ),
    CppBug(
        MANY,
        "the first product is recomputed without its bias",
        "backward.cpp",
        "biased ? bias : nullptr, hidden +",
        "nullptr, hidden +",
    ),
    CppBug(
        MANY,
        "chunks of rows are planned for one direction only",
        "backward.cpp",
        "std::min(chunk_rows<D>(q.gate_up), chunk_rows<D>(q.gate_up.flipped()))",
        "chunk_rows<D>(q.gate_up)",
    ),
    CppBug(
        GRADIENTS,
        "the gradient of down_bias is not weighted",
        "backward.cpp",
        "weight = plan.weight.data();",
        "weight = nullptr;",
    ),
    CppBug(
        GRADIENTS,
        "gradients of routing weights lack the bias' part",
        "backward.cpp",
        "if (q.down_bias.data)",
        "if (false)",
    ),
    CppBug(
        GRADIENTS,
        "gradients of routing weights read the bias in reverse order",
        "backward.cpp",
        "q.down_bias.at(e, i)",
        "q.down_bias.at(e, hidden - 1 - i)",
    ),
    CppBug(
        GRADIENTS,
        "the gradient of gate_up_bias is stored for the previous expert",
        "backward.cpp",
        "to.gate_up_bias + e * width",
        "to.gate_up_bias + (e ? e - 1 : e) * width",
    ),
    CppBug(
        GRADIENTS,
        "the bias of down is added to the gradient of x",
        "backward.cpp",
        "back.down_bias = {nullptr, Type::f32, 0};",
        "",
    ),
    CppBug(
        GRADIENTS,
        "the gradient of down is of unweighted rows",
        "backward.cpp",
        "store(a + v, weight * s.value);",
        "store(a + v, s.value);",
    ),
    CppBug(
        GRADIENTS,
        "the gradient of the hidden rows is not weighted",
        "backward.cpp",
        "weight * d_a * s.to_up",
        "d_a * s.to_up",
    ),
    CppBug(
        GRADIENTS,
        "interleaved gates and ups are stored as packed",
        "backward.cpp",
        "gated && q.gate_up.interleaved, int64_t(panel)",
        "false, int64_t(panel)",
    ),
    CppBug(
        GRADIENTS,
        "outer products are transposed",
        "backward.cpp",
        "outer_products<D>(pool, out_in ? g : s, out_in ? s : g",
        "outer_products<D>(pool, out_in ? s : g, out_in ? g : s",
    ),
    CppBug(
        GRADIENTS,
        "dot products are of the first panel only",
        "backward.cpp",
        "for (int p = 0; p < panels; p++) sum +=",
        "for (int p = 0; p < 1; p++) sum +=",
    ),
    CppBug(
        GRADIENTS,
        "silu's derivative lacks its second term",
        "activation.h",
        "{g * s, s + a.alpha * g * s * (1.f - s)}",
        "{g * s, s}",
    ),
    CppBug(
        GRADIENTS,
        "values beyond the limit have a gradient",
        "activation.h",
        "pass_u = select(u > a.limit, zero, select(u < -a.limit, zero, one));",
        "",
    ),
    CppBug(
        LIMITS,
        "a value at the limit has no gradient",
        "activation.h",
        "select(u < -a.limit, zero, one)",
        "select(u <= -a.limit, zero, one)",
    ),
    CppBug(
        GRADIENTS,
        "saved pre-activations of padding rows are not cleared",
        "forward.h",
        "if (!q.pre) return;",
        "return;",
    ),
    CppBug(
        SEGMENTS,
        "all segments are summed into the first result",
        "kernels.cpp",
        "if (s * sets / g.segments != set) continue;",
        "if (set) continue;",
    ),
    CppBug(
        OUTER,
        "the result of an expert without rows is not written",
        "kernels.h",
        "if (!inner) {",
        "if (!inner) { continue;",
    ),
    CppBug(
        OUTER,
        "the result of an expert without rows is tiny instead of 0",
        "kernels.h",
        "std::memset(result + i * n + column, 0,",
        "std::memset(result + i * n + column, 1,",
    ),
    CppBug(
        SEGMENTS,
        "the second row of the last bfloat16 pair is left out",  # a read past the end is AddressSanitizer's to find
        "panels.h",
        "D::PER_DWORD == 2 && r + 1 < inner ? row(r + 1)",
        "D::PER_DWORD == 2 && r + 2 < inner ? row(r + 1)",
    ),
    # the forward pass
    CppBug(
        FORWARD,
        "ids out of range are not checked",
        "kernels.h",
        "return uint64_t(id) < uint64_t(q.experts);",
        "return true;",
    ),
    CppBug(
        FORWARD,
        "the bias of the second product is not weighted",
        "kernels.h",
        "if (biased) product += load(bias + v);",
        "if (biased) product += load(bias + v) / weight;",
    ),
    CppBug(
        FORWARD,
        "the bias of the gates is added to the ups",
        "forward.h",
        "u += load(bias + PANEL / 2 + c)",
        "u += load(bias + c)",
    ),
    CppBug(
        FORWARD,
        "blocks of the inner dimension overwrite each other",
        "product.h",
        "steps_here, c, k > 0,",
        "steps_here, c, false,",
    ),
    CppBug(
        FEW,
        "a strip is read past the end of the weights",
        "stream.h",
        "if ((row + ROWS - 1) * pitch + c + STRIP<D> <= end) {",
        "if (true) {",
    ),
    CppBug(
        HALVES,
        "float16 is rounded towards zero",
        "simd.h",
        "_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)",
        "_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_ZERO)",
    ),
    CppBug(
        PRODUCTS,
        "the second of a pair of float16 is the first of the row",
        "simd.h",
        "splat(pair[1]) * b.second",
        "splat(pair[0]) * b.second",
    ),
    CppBug(PRODUCTS, "outputs of padding rows are not cleared", "kernels.cpp", "clear(groups.rows);", ""),
    CppBug(
        CODES,
        "zero points are ignored",
        "codes.h",
        "zero ? __builtin_convertvector(integers(zero + v * WIDTH), vec) : symmetric",
        "symmetric",
    ),
    CppBug(CODES, "decoded weights ignore zero points", "decoded.h", "if (ZERO) x = x - zero[u];", ""),
    CppBug(
        CODES,
        "sums of decoded weights have no scale",
        "decoded.h",
        "if (scales) DecodedPanels",
        "if (false) DecodedPanels",
    ),
    # errors
    CppBug(
        REFUSED,
        "prepared weights with too few bytes in a row are accepted",
        "binding.cpp",
        "&& t.size(3) * w.element",
        "|| t.size(3) * w.element",
    ),
    CppBug(
        REFUSED,
        "a gradient of another dtype or shape is accepted",
        "binding.cpp",
        "&& gradient.scalar_type() ==",
        "|| gradient.scalar_type() ==",
    ),
    CppBug(REFUSED, "a weight with too few experts is accepted", "binding.cpp", "weight.size(0) == wanted", "true"),
    CppBug(
        REFUSED,
        "ends past their segment are accepted",
        "binding.cpp",
        "last = first + rows / segments",
        "last = first + rows * segments",
    ),
)
