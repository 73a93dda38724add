"""Planted bugs of the Triton kernels: each must break the test that it names.

Each runs in its own process, so only `make test-thorough` runs all of them.
"""

from dataclasses import dataclass

from tools import ROOT
from tools.copied_tree import place_of


@dataclass(frozen=True)
class TritonBug:
    """`old`, which occurs once in `file` of the kernels, is replaced by `new`; then
    `property_tests/test_triton_<test>` must fail.
    """

    test: str
    what: str
    file: str
    old: str
    new: str

    @property
    def path(self) -> str:
        """Path of the file, relative to the repository's root."""
        return f"moe_fn/kernels/triton/{self.file}.py"

    @property
    def source(self) -> str:
        """The text of the file with the bug."""
        text = (ROOT / self.path).read_text()
        place = place_of(self.old, text, f"{self.what}: {self.path}")
        return text[:place] + self.new + text[place + len(self.old) :]


DOWN_BACKWARD = "backward.py::test_down_backward_is_the_gradient_of_the_weighted_down_projection"
OUTER = "backward.py::test_grouped_outer_sums_over_the_rows_of_each_group"
SUMS = "backward.py::test_segment_sums_add_up_the_rows_of_each_group"
UP, PRODUCTS = (
    "products.py::test_up_gathers_multiplies_and_activates",
    "products.py::test_grouped_products_multiply_each_row_by_its_group",
)
ACTIVATIONS = "products.py::test_activations_and_their_derivatives_are_those_of_torch"
SORT, COMBINE = "rows.py::test_both_forms_sort_as_torch_does", "rows.py::test_gather_sum_is_the_weighted_sum_of_slots"
TOP_K, CODES = "top_k.py::test_routing_equals_route", "quant.py::test_rows_are_quantized_to_the_codes_of_torch"
ALONE = "quant.py::test_weights_alone_in_codes"
STAGES = "quant.py::test_the_stages_decode_in_the_product"

BUGS = (
    TritonBug(
        COMBINE,
        "slots of no expert add the last row",
        "combine",
        "mask = (row >= 0)[:, None]",
        "mask = (row >= -1)[:, None]",
    ),
    TritonBug(
        COMBINE, "the last token is not stored", "combine", "mask = (t < T)[:, None]", "mask = (t < T - 1)[:, None]"
    ),
    TritonBug(
        COMBINE,
        "the last choice is left out",
        "combine",
        "for j in tl.static_range(TOP_K)",
        "for j in tl.static_range(TOP_K - 1)",
    ),
    TritonBug(
        OUTER,
        "only the last block of rows is summed",
        "outer",
        "acc = tl.dot(tl.trans(a), b, acc,",
        "acc = tl.dot(tl.trans(a), b, None,",
    ),
    TritonBug(
        OUTER,
        "rows of the next group are not masked",
        "outer",
        "mask=live[:, None], other=0.0)\n        acc = tl.dot",
        "other=0.0)\n        acc = tl.dot",
    ),
    TritonBug(
        SUMS,
        "weighted and unweighted sums are exchanged",
        "outer",
        "if WEIGHTED:\n            v *=",
        "if not WEIGHTED:\n            v *=",
    ),
    TritonBug(
        SUMS,
        "the bias' gradient sums rows of another token",
        "outer",
        "source = (slot // TOP_K)",
        "source = (slot // (TOP_K + 1))",
    ),
    TritonBug(
        DOWN_BACKWARD,
        "the gradient of the hidden rows is not weighted",
        "down_backward",
        "d * w[:, None], gate, up, ACTIVATION",
        "d, gate, up, ACTIVATION",
    ),
    TritonBug(
        DOWN_BACKWARD, "the input of down's gradient is not weighted", "down_backward", "(a * w[:, None]).to(", "a.to("
    ),
    TritonBug(
        DOWN_BACKWARD,
        "gradients of gates and ups are exchanged",
        "down_backward",
        "tl.join(d_gate, d_up)",
        "tl.join(d_up, d_gate)",
    ),
    TritonBug(
        DOWN_BACKWARD,
        "gradients of routing weights lack the bias' part",
        "down_backward",
        "num_partials - 1, tl.sum(acc, 1)",
        "num_partials - 1, 0 * tl.sum(acc, 1)",
    ),
    TritonBug(
        DOWN_BACKWARD,
        "gradients of routing weights are those of the first tile",
        "down_backward",
        "(i < num_partials)[None, :]",
        "(i < 1)[None, :]",
    ),
    TritonBug(UP, "the gate's bias is added to up", "up", "up += tl.load(bias + I + c,", "up += tl.load(bias + c,"),
    TritonBug(
        UP,
        "saved pre-activations are zeros",
        "up",
        "tl.store(pre + all_places, tile.to(",
        "tl.store(pre + all_places, (0 * tile).to(",
    ),
    TritonBug(
        UP,
        "rows of other tokens are gathered",
        "up",
        "tl.where(live, row, 0)) // TOP_K\n    k =",
        "tl.where(live, row, 0)) % TOP_K\n    k =",
    ),
    TritonBug(
        PRODUCTS,
        "the last, partial tile is not masked",
        "products",
        "a = tl.load(left, mask=(k < length - start)[None, :], other=0.0)",
        "a = tl.load(left)",
    ),
    TritonBug(
        PRODUCTS,
        "the last column is not stored",  # storing one more would crash, and a crash names no test
        "products",
        "mask=live[:, None] & (c < N)[None, :])",
        "mask=live[:, None] & (c < N - 1)[None, :])",
    ),
    TritonBug(
        SORT,
        "ids out of range are the last expert's",
        "metadata",
        "tl.where((e >= 0) & (e < E), e, E)",
        "tl.where((e >= 0) & (e < E), e, E - 1)",
    ),
    TritonBug(
        SORT,
        "the first expert has no slots",
        "metadata",
        "tl.where((e >= 0) & (e < E), e, E)",
        "tl.where((e > 0) & (e < E), e, E)",
    ),
    TritonBug(
        ACTIVATIONS,
        "gelu's derivative lacks its second term",
        "activation",
        " + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)",
        "",
    ),
    TritonBug(
        ALONE,
        "the global scale is read at another offset",
        "quant/up",
        "factor + expert * (WIDTH * I // half_columns),",
        "factor + expert + (WIDTH * I // half_columns),",
    ),
    TritonBug(
        STAGES,
        "the zero point of another group is read",
        "quant/products",
        "tl.load(zero + (start // TILE_IN",
        "tl.load(zero - (start // TILE_IN",
    ),
    TritonBug(CODES, "powers of two are rounded down", "quant/inputs", "+ 0x7FFFFF) & 0x7F800000", "+ 0) & 0x7F800000"),
    TritonBug(
        CODES,
        "codes are truncated instead of rounded",
        "quant/inputs",
        "q = q + 12582912.0 - 12582912.0",
        "q = q + 0.0",
    ),
    TritonBug(
        CODES,
        "a row's scale is that of its first values",
        "quant/inputs",
        "for start in range(0, SPAN, WIDTH):\n            c =",
        "for start in range(0, 1, WIDTH):\n            c =",
    ),
)
