"""Reference quantization: codes of weights decoded in float64, and inputs rounded by search over all numbers of a
format.
"""

import math

import torch
from torch import Tensor

from moe_fn.config import ActivationQuantConfig, MoEConfig, QuantConfig, as_activation
from moe_fn.config.quant import ELEMENTS
from moe_fn.records import MoEWeights
from moe_fn.reference.tensors import needed

_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_POSITIVE = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
_POSITIVE[-1] = math.nan
# The value of every code of a format, in the order of the codes as unsigned integers.
VALUES: dict[str, list[float]] = {
    "e4m3": _POSITIVE + [-value for value in _POSITIVE],
    "int8": [float(code - 256 if code > 127 else code) for code in range(256)],
    "int4": [float(code - 8) for code in range(16)],
    "e2m1": _MAGNITUDES + [-value for value in _MAGNITUDES],
}


def numbers_of(element: str) -> list[float]:
    """Every number of a format, ascending.

    >>> numbers_of("e2m1")[-3:], numbers_of("e4m3")[-2:], len(numbers_of("int8"))
    ([3.0, 4.0, 6.0], [416.0, 448.0], 256)
    """
    return sorted({value + 0.0 for value in VALUES[element] if not math.isnan(value)})


def matrices(config: MoEConfig, weights: MoEWeights, name: str) -> list[Tensor]:
    """gate_up or down of each expert, decoded: float64 [out, in].

        W[n, k] = (q[n, k] - zero[i, j]) * scale[i, j] * global[half of n], (i, j) the tile of (n, k)

    Source: vLLM's quantization schemes.
    """
    quant, stored = config.quant, weights.quant
    if quant is None or stored is None:
        raise ValueError("weights.quant is None; expected scales, since config.quant is given")
    codes = getattr(weights, name)
    if len(VALUES[quant.row.element]) == 16:
        codes = torch.stack([codes % 16, codes // 16], -1).reshape(codes.shape[0], codes.shape[1], -1)
    halves = (
        2 if name == "gate_up" and as_activation(config.activation).gated and config.gate_up_layout == "packed" else 1
    )
    outputs, inputs = codes.shape[1], codes.shape[2]
    row, column = places(quant, halves, outputs, inputs)
    scale = scales(quant, needed(getattr(stored, f"{name}_scale"), f"weights.quant.{name}_scale"))
    zero = getattr(stored, f"{name}_zero_point")
    above = getattr(stored, f"{name}_global_scale")
    found = []
    for expert in range(codes.shape[0]):
        values = code_values(quant, codes[expert])
        if zero is not None:
            values = values - zero[expert].to(torch.float64)[row][:, column]
        values = values * scale[expert][row][:, column]
        if above is not None:
            half = [n // (outputs // halves) for n in range(outputs)]
            values = values * above[expert, half].to(torch.float64)
        found.append(values)
    return found


def places(quant: QuantConfig, halves: int, outputs: int, inputs: int) -> tuple[list[int], list[int]]:
    """Row and column of the scale of each output and each input."""
    of_half = outputs // halves
    tall, wide = {
        "tensor": (of_half, inputs),
        "channel": (1, inputs),
        "group": (1, quant.group_size or inputs),
        "block": quant.block_shape or (1, 1),
    }[quant.granularity]
    rows = [n // of_half * math.ceil(of_half / tall) + n % of_half // tall for n in range(outputs)]
    return rows, [k // wide for k in range(inputs)]


def code_values(quant: QuantConfig, codes: Tensor) -> Tensor:
    """Values of codes before zero points and scales; codes with zero points are integers."""
    if quant.zero_points:
        return codes.to(torch.float64)
    table = torch.tensor(VALUES[quant.row.element], dtype=torch.float64, device=codes.device)
    stored = codes.to(ELEMENTS[quant.row.element].dtype)  # float8 codes are float64 here
    return table[stored.view(torch.uint8).to(torch.int64)]


def scales(quant: QuantConfig, scale: Tensor) -> Tensor:
    """Scales as float64; those of mx schemes are exponents."""
    return 2.0 ** (scale.to(torch.float64) - 127) if quant.row.scale == "e8m0" else scale.to(torch.float64)


def rounded(
    config: ActivationQuantConfig,
    v: Tensor,
    *,
    static_scale: float | None = None,
    amax_of_call: float | None = None,
    single: bool = True,
) -> Tensor:
    """v [K] float64, rounded to codes times scales; the gradient passes through.

    Scales and quotients are rounded to float32 if `single`, as in vLLM's kernels.

    >>> a = ActivationQuantConfig(scheme="int8", granularity="token")
    >>> rounded(a, torch.tensor([1.0, 0.4999, -0.0039], dtype=torch.float64)) * 127
    tensor([127.0000,  63.0000,   0.0000], dtype=torch.float64)
    """
    size = config.group_size or v.numel()
    table = torch.tensor(numbers_of(config.row.element), dtype=torch.float64, device=v.device)
    pieces = []
    for group in v.detach().split(size):
        largest = float(group.abs().max()) if group.numel() else 0.0
        if config.scheme == "nvfp4":
            above = (
                static_scale
                if static_scale is not None
                else _single(float(v.detach().abs().max()) / (448 * 6), single) or 1.0
            )
            scale = float(
                nearest(
                    table_of_e4m3(v), torch.tensor([_single(largest / _single(6 * above, single), single)]).to(table)
                )[0]
            )
            unit = [
                _single(_single(value / above, single) / scale, single) if scale else 0.0 for value in group.tolist()
            ]
            step = _single(scale * above, single)
        else:
            shared = amax_of_call if amax_of_call is not None else largest
            step = static_scale if static_scale is not None else scale_of(config, shared, single)
            unit = [_single(value / step, single) for value in group.tolist()]
        pieces.append(nearest(table, torch.tensor(unit, dtype=torch.float64, device=v.device)) * step)
    whole = torch.cat(pieces) if pieces else v.detach()
    return whole + (v - v.detach())


def scale_of(config: ActivationQuantConfig, largest: float, single: bool) -> float:
    """The scale of numbers up to `largest`."""
    if math.isnan(largest) or math.isinf(largest):
        return largest
    if config.scheme == "mxfp8":
        return 2.0 ** min(max(_log2(_single(largest / 448, single), math.ceil), -127), 127)
    if config.scheme == "mxfp4":
        return 2.0 ** min(max(_log2(largest, math.floor) - 2, -127), 127)
    if config.scheme == "int8":
        return max(_single(largest / 127, single), _single(1e-10,
        single)) if config.granularity == "tensor" else _single(
            max(largest, _single(1e-10, single)) / 127, single
        )  # fmt: skip
    if config.granularity == "token":
        return max(_single(largest / 448, single), _single(1 / (448 * 512), single))
    scale = _single(max(largest, _single(1e-10, single)) / 448, single)
    return 2.0 ** _log2(scale, math.ceil) if config.power_of_two_scales else scale


def table_of_e4m3(like: Tensor) -> Tensor:
    """All numbers of e4m3."""
    return torch.tensor(numbers_of("e4m3"), dtype=torch.float64, device=like.device)


def _log2(value: float, rounding: object) -> int:
    """Exact floor or ceil of log2 of a positive number; -10000 for 0."""
    if value == 0:
        return -10000
    mantissa, exponent = math.frexp(value)
    return exponent - 1 + (1 if rounding is math.ceil and mantissa > 0.5 else 0)


def _single(value: float, single: bool) -> float:
    return float(torch.tensor(value, dtype=torch.float32)) if single else value


def nearest(table: Tensor, values: Tensor) -> Tensor:
    """The nearest entries of an ascending table; ties go to the entry at an even distance from 0's. NaN stays NaN."""
    zero = int((table == 0).nonzero()[0])
    above = torch.searchsorted(table, values.nan_to_num()).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = (table[above] - values).abs(), (values - table[below]).abs()
    tie_up = (up == down) & ((above - zero) % 2 == 0)
    chosen = torch.where((up < down) | tie_up, table[above], table[below])
    chosen = torch.where(values >= table[-1], table[-1], torch.where(values <= table[0], table[0], chosen))
    return torch.where(values.isnan(), values, chosen)
