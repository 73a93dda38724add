"""Signatures of the kernels and the options that change their code, as data for the cases of ahead_of_time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig
from moe_fn.kernels.triton import combine, down_backward, metadata, outer, products, small_batch, top_k, up

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Names of a kernel's arguments by type; constants: those that no option changes; unaligned: arguments that may not
    be multiples of 16.
    """

    kernel: Any
    data: str = ""  # pointers to elements of the case's dtype
    indices: str = ""  # pointers to int32
    ids: str = ""  # pointers to int64
    floats: str = ""  # pointers to float32
    sizes: str = ""  # int32
    long_sizes: str = ""  # int64
    unaligned: str = ""
    constants: Mapping[str, Any]
    warps: int = 4

    def types(self, dtype: str) -> dict[str, str]:
        """Returns the type of each argument."""
        kinds = (
            (self.data, f"*{dtype}"), (self.indices, "*i32"), (self.ids, "*i64"), (self.floats, "*fp32"),
            (self.sizes, "i32"), (self.long_sizes, "i64"),
        )  # fmt: skip
        return {name: kind for names, kind in kinds for name in names.split()}


_MAPS = "slot_of_row starts expert_of_tile first_row_of_tile"
_DECODE_UP = Signature(
    kernel=small_batch._up_kernel,
    data="x weight bias activated",
    ids="expert_ids",
    sizes="num_experts hidden intermediate stride_x",
    long_sizes="stride_expert",
    unaligned="num_experts",
    constants={"TOP_K": 8},
)
_DECODE_DOWN = Signature(
    kernel=small_batch._down_kernel,
    data="activated weight bias out",
    ids="expert_ids",
    floats="weights",
    sizes="num_experts intermediate hidden",
    long_sizes="stride_expert",
    unaligned="num_experts",
    constants={},
)
GROUPED: dict[str, Signature] = {
    "up": Signature(
        kernel=up._up_kernel,
        data="x weight bias activated pre",
        indices=_MAPS,
        sizes="row_tiles H I stride_x stride_expert",
        unaligned="row_tiles",
        constants={"TOP_K": 8, "GROUP": 8},
    ),
    "product": Signature(
        kernel=products._product_kernel,
        data="rows weight bias out",
        indices="slot_of_row ends group_of_tile first_row_of_tile weight_of_group",
        sizes="row_tiles K N stride_rows stride_group",
        unaligned="row_tiles ends",
        constants={"TOP_K": 8, "GROUP": 8},
    ),
    "down_backward": Signature(
        kernel=down_backward._down_backward_kernel,
        data="gradient down pre d_pre weighted",
        indices=_MAPS,
        floats="weights partials",
        sizes="row_tiles H I stride_gradient stride_expert num_partials",
        unaligned="row_tiles num_partials",
        constants={"TOP_K": 8, "GROUP": 8, "WEIGHTED": True},
    ),
    "outer": Signature(
        kernel=outer._outer_kernel,
        data="left right out",
        indices="slot_of_row starts ends",
        sizes="M N stride_left stride_right",
        unaligned="ends",
        constants={"TOP_K": 8},
    ),
    "decode_up": _DECODE_UP,
    "decode_up_in_out": _DECODE_UP,
    "decode_down": _DECODE_DOWN,
    "decode_down_in_out": _DECODE_DOWN,
}

# Options that change the code of a kernel; the first is the usual form. Names in capitals are constants of the kernels;
# activation is a preset; in_out: columns of the weights are contiguous; odd: sizes that are not multiples of 16; out:
# the dtype of the result.
VARIANTS: dict[str, tuple[Options, ...]] = {
    "up": (
        {},
        {"KEEP": True},
        {"KEEP": True, "BIAS": True, "INTERLEAVED": True, "in_out": True, "activation": "swigluoai"},
        {"KEEP": True, "EVEN": False, "activation": "relu2_no_mul"},
    ),
    "product": ({}, {"BIAS": True, "in_out": True}, {"GATHER": True, "INDIRECT": True, "EVEN": False}),
    "down_backward": (
        {},
        {"INTERLEAVED": True, "in_out": True, "activation": "swigluoai"},
        {"EVEN": False, "activation": "relu2_no_mul"},
        {"STORE_ACTIVATED": False, "activation": "gelu"},
    ),
    "outer": ({}, {"GATHER_LEFT": True}, {"GATHER_RIGHT": True}, {"out": "fp32"}),
    "decode_up": ({}, {"BIAS": True, "activation": "swigluoai"}, {"activation": "relu2_no_mul"}),
    "decode_up_in_out": (
        {},
        {"BIAS": True, "INTERLEAVED": True, "activation": "swigluoai"},
        {"activation": "relu2_no_mul"},
    ),
    "decode_down": ({}, {"BIAS": True}),
    "decode_down_in_out": ({}, {"BIAS": True}),
}
ODD_VARIANTS: dict[str, tuple[Options, ...]] = {
    "up": ({"odd": True, "KEEP": True, "activation": "gelu"},),
    "product": ({"odd": True}, {"odd": True, "in_out": True}),
    "down_backward": ({"odd": True, "activation": "gelu_tanh"},),
    "outer": ({"odd": True, "GATHER_LEFT": True},),
}

_BINS = {"EXPERTS": 256, "CHUNK": 128, "TILE_ROWS": (16, 64, 128)}
_SORTED = "slot_of_row row_of_slot starts expert_of_tile first_row_of_tile"
_COMBINE = {"TOP_K": 8, "UNROLL": True, "WEIGHTED": True, "TOKENS": 1, "COLUMNS": 1024}


def _sort(**constants: Any) -> Signature:
    return Signature(
        kernel=metadata._sort_kernel, indices=_SORTED, ids="ids", sizes="R E", unaligned="R E",
        constants={"BLOCK": 1024, **constants}, warps=8,
    )  # fmt: skip


def _place(**constants: Any) -> Signature:
    return Signature(
        kernel=metadata._place_kernel, indices=f"before totals {_SORTED}", ids="ids", sizes="R E blocks",
        unaligned="E blocks",
        constants={"BLOCK": 1024, **constants}, warps=8,
    )  # fmt: skip


def _route(groups: int, side: int, best: int, router: RouterConfig) -> Signature:
    """Returns the signature of the router for 128 experts, or 256 in eight groups."""
    config = MoEConfig(num_experts=groups * side, top_k=best, hidden_size=64, intermediate_size=64, router=router)
    biased = router.correction_bias != "none"
    constants = {
        **top_k._constants(config),
        "ROWS": max(1, 1024 // (groups * side)),
        "GROUPS": groups,
        "SIDE": side,
        "BEST": best,
    }
    return Signature(
        kernel=top_k._route_kernel, data="logits", ids="ids", floats="bias weights" if biased else "weights",
        sizes="T stride",
        unaligned="T", constants=constants if biased else {"bias": None, **constants},
    )  # fmt: skip


# Kernels with tiles that do not depend on the sizes of matrices.
ROWS: dict[str, Signature] = {
    "sort": _sort(**_BINS),
    "sort 1024 experts": _sort(**{**_BINS, "EXPERTS": 2048, "CHUNK": 16}),
    "count": Signature(
        kernel=metadata._count_kernel, indices="counts", ids="ids", sizes="R E", unaligned="E",
        constants={"BLOCK": 1024, "EXPERTS": 256}
    ),
    "scan": Signature(
        kernel=metadata._scan_kernel, indices="counts before totals", sizes="blocks E", unaligned="blocks E",
        constants={"BLOCKS": 128, "COLUMNS": 32},
    ),
    "place": _place(**_BINS),
    "place 1024 experts": _place(**{**_BINS, "EXPERTS": 2048, "CHUNK": 16}),
    "combine": Signature(
        kernel=combine._gather_sum_kernel, data="rows out", indices="row_of_slot", floats="weights",
        sizes="T H stride_row", unaligned="T",
        constants=_COMBINE,
    ),
    "combine without weights, 32 choices": Signature(
        kernel=combine._gather_sum_kernel, data="rows out", indices="row_of_slot", sizes="T H stride_row",
        unaligned="T",
        constants={**_COMBINE, "weights": None, "WEIGHTED": False, "TOP_K": 32, "UNROLL": False},
    ),
    "bias dots": Signature(
        kernel=down_backward._bias_dots_kernel, data="gradient bias", indices=_MAPS, floats="partials",
        sizes="H stride_gradient num_partials", unaligned="num_partials", constants={"TOP_K": 8, "BM": 128, "BK": 64},
        warps=8,
    ),
    "sum of partials": Signature(
        kernel=down_backward._sum_partials_kernel, indices="row_of_slot", floats="partials out",
        sizes="num_slots num_partials",
        unaligned="num_slots num_partials", constants={"BLOCK": 256, "WIDTH": 16},
    ),
    "segment sums": Signature(
        kernel=outer._segment_sums_kernel, data="rows", indices="slot_of_row starts ends", floats="weights out",
        sizes="N stride_rows",
        unaligned="ends", constants={"TOP_K": 8, "GATHER": True, "WEIGHTED": True, "BM": 32, "BN": 128},
    ),
    "route softmax": _route(1, 128, 8, RouterConfig()),
    "route sigmoid of groups": _route(
        8, 32, 8, RouterConfig(scoring="sigmoid", correction_bias="scores", groups=GroupConfig(count=8, top_k=4,
        score="top2_sum"))
    ),
}  # fmt: skip
