"""Error bounds of quantized inputs of experts: where a value may be on either side of a tie, balls have both codes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import ActivationQuantConfig
from moe_fn.reference.quant import nearest, numbers_of, scale_of
from moe_fn.testing.bounds.ball import Ball

Ends = tuple[Tensor, Tensor, Tensor]  # lower end of an interval, float64 value, upper end


@dataclass(frozen=True)
class Scales:
    """Values are divided by `above` (1 except for nvfp4), then by `scale`; codes are multiplied by `step`."""

    above: Ends
    scale: Ends
    step: Ends


def coded(
    config: ActivationQuantConfig, v: Ball, static: Tensor | None, of_call: Ball | None, single: bool
) -> tuple[Ball, Tensor]:
    """v [..., K] as codes times scales, and whether a code is undecided (a tie): bool [..., K].

        code' in [round((v - r) / s), round((v + r) / s)]

    with s between the scales of the largest magnitude minus and plus its radius.

    static [...]: a scale for each row, or None; of_call: the largest magnitude of all rows of the call, where they
    share a scale. Rounding is monotone, so the ends of an interval bound its interior, also at ties and with
    power-of-two scales.
    """
    size = config.group_size or v.value.shape[-1]
    groups = v.map(lambda t: _by_group(t, size))
    of_group = groups.map(lambda t: t.abs().amax(-1, keepdim=True))
    of_group = Ball(of_group.value, groups.radius.amax(-1, keepdim=True))
    largest = (
        of_group
        if of_call is None
        else Ball(of_call.value.expand_as(of_group.value), of_call.radius.expand_as(of_group.radius))
    )
    above = None if static is None else static[..., None, None]
    scales = (
        _of_nvfp4(largest, above, single)
        if config.row.has_global_scale
        else _of_largest(config, largest, above, single)
    )
    table = torch.tensor(numbers_of(config.row.element), dtype=torch.float64)
    low, middle, high = (
        [_codes(table, groups.value + sign * groups.radius, scales.above[i], scales.scale[i], single) for i in places]
        for sign, places in ((-1.0, (0, 2)), (0.0, (1,)), (1.0, (0, 2)))
    )
    least, most = torch.minimum(*low), torch.maximum(*high)
    value = middle[0] * scales.step[1]
    ends = [code * scales.step[i] for code in (least, most) for i in (0, 2)]
    radius = torch.stack([(end - value).abs() for end in ends]).amax(0)
    undecided = least != most
    return Ball(value, radius).map(lambda t: _flat(t, v.value.shape[-1])), _flat(undecided, v.value.shape[-1])


def _codes(table: Tensor, values: Tensor, above: Tensor, scale: Tensor, single: bool) -> Tensor:
    quotient = _single(values / above, single) / torch.where(scale == 0, 1, scale)
    return nearest(table, _single(torch.where(scale == 0, 0, quotient), single).contiguous())


def _of_largest(config: ActivationQuantConfig, largest: Ball, static: Tensor | None, single: bool) -> Scales:
    one = torch.ones(1, dtype=torch.float64)
    found = (
        [_each(t, lambda amax: scale_of(config, amax, single)) for t in _ends(largest)]
        if static is None
        else [static] * 3
    )
    scales = (found[0], found[1], found[2])
    return Scales((one, one, one), scales, scales)


def _of_nvfp4(largest: Ball, static: Tensor | None, single: bool) -> Scales:
    """Scales of nvfp4: e4m3 scales of groups, times `above`, which without a static scale is the largest magnitude of
    the row / (448 * 6).
    """
    table = torch.tensor(numbers_of("e4m3"), dtype=torch.float64)
    row = Ball(largest.value.amax(-2, keepdim=True), largest.radius.amax(-2, keepdim=True))
    found = [_single(t / (448 * 6), single) for t in _ends(row)] if static is None else [static] * 3
    low, middle, high = (torch.where(t == 0, 1.0, t) for t in found)
    groups = zip(_ends(largest), (high, middle, low), strict=True)
    scales = [nearest(table, _single(amax / _single(6 * above, single), single).contiguous()) for amax, above in groups]
    steps = [_single(scale * above, single) for scale, above in zip(scales, (low, middle, high), strict=True)]
    return Scales((low, middle, high), (scales[0], scales[1], scales[2]), (steps[0], steps[1], steps[2]))


def _ends(a: Ball) -> Ends:
    return (a.value - a.radius).clamp(min=0), a.value, a.value + a.radius


def _each(values: Tensor, function: Callable[[float], float]) -> Tensor:
    return torch.tensor([function(float(value)) for value in values.flatten()], dtype=torch.float64).reshape(
        values.shape
    )


def _single(values: Tensor, single: bool) -> Tensor:
    return values.to(torch.float32).to(torch.float64) if single else values


def _by_group(t: Tensor, size: int) -> Tensor:
    padded: Tensor = torch.nn.functional.pad(t, (0, -t.shape[-1] % size))
    groups: Tensor = padded.unflatten(-1, (-1, size))
    return groups


def _flat(t: Tensor, width: int) -> Tensor:
    return t.flatten(-2)[..., :width]
