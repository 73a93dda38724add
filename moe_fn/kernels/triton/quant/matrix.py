"""Quantized matrices and their scales' tiles, as arguments of the kernels."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_fn.config import QuantConfig
from moe_fn.quant.codes import Codes

Place = Literal["inner", "step", "outer"]


@dataclass(frozen=True, kw_only=True)
class QuantMatrix:
    """W[e, n, k] = (code[e, n, k] - zero) * scale[e, row of n, k // inputs] * global_scale[e, half of n] for output n
    and input k.

    payload is [E, N, K / codes per byte], contiguous along inputs; scale and zero_point (uint8) are [E, halves * rows
    of a half, in_tiles]. A scale covers a tile of `outputs` x `inputs` weights of a half. The tile of each granularity:
    tensor (N / halves, K), channel (1, K), group (1, g), block (bn, bk).
    """

    payload: Tensor
    scale: Tensor
    per_byte: int  # codes in a byte
    scheme: str  # "fp8_e4m3", "int8", "uint8", "int4", "e2m1"
    outputs: int
    inputs: int
    halves: int = 1
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, columns, width = self.payload.shape
        return experts, columns, width * self.per_byte

    @property
    def shared(self) -> tuple[int, ...]:
        """The number of inputs that share a scale; empty if all do."""
        return () if self.inputs >= self.shape[2] else (self.inputs,)

    def place(self, step: int) -> Place:
        """Where a kernel that sums `step` inputs at a time applies the scale.

        outer: to the sum, if a scale covers all inputs; step: to the product of a step; inner: to the weights, before
        the product.
        """
        if self.inputs >= self.shape[2]:
            return "outer"
        return "step" if self.inputs % step == 0 else "inner"

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of every kernel after the payload."""
        _, columns, _ = self.shape
        scale = codes_of(self.scale.contiguous())
        zero, factor = (scale if t is None else t.contiguous() for t in (self.zero_point, self.global_scale))
        return (
            scale,
            zero,
            factor,
            columns // self.halves,
            self.scale.shape[1] // self.halves,
            self.outputs,
            self.scale.shape[2],
        )

    def constants(self, step: int) -> dict[str, Any]:
        """The constexpr arguments of every kernel."""
        forms = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}
        place = self.place(step)
        return {
            "SCHEME": self.scheme,
            "PLACE": place,
            "SCALE_FORM": forms.get(self.scale.dtype, "float"),
            "TILE_IN": 1 if place == "outer" else self.inputs,
            "ZERO": self.zero_point is not None,
            "GLOBAL": self.global_scale is not None,
        }


def matrix_of(quant: QuantConfig, stored: Codes, halves: int) -> QuantMatrix:
    """What `stored` is under a config; halves: parts of the outputs that are tiled apart."""
    outputs, inputs = quant.tile
    per_half = stored.codes.shape[1] // halves
    element = quant.row.element
    return QuantMatrix(
        payload=stored.codes.contiguous(),
        scale=stored.scale,
        per_byte=quant.per_byte,
        scheme={"e4m3": "fp8_e4m3", "int8": "uint8" if quant.zero_points else "int8"}.get(element, element),
        outputs=per_half if outputs is None else outputs,
        inputs=stored.codes.shape[2] * quant.per_byte if inputs is None else inputs,
        halves=halves,
        zero_point=stored.zero_point,
        global_scale=stored.global_scale,
    )


def codes_of(values: Tensor) -> Tensor:
    """8-bit values as uint8: the kernels decode them from bits."""
    return values.view(torch.uint8) if values.element_size() == 1 else values
