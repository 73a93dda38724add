"""Comparison of results by relative root-mean-square error, with one tolerance per dtype."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Limits of the relative RMS error of correct code against float64, weights scaled by 1/sqrt(fan_in). Measured: float32
# 2-5e-7, bfloat16 5-6e-3 (constant from width 64 to 2048). The error of the closest wrong activation is 0.17, that of a
# missing factor of 0.6 is 0.4.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}

# Limit of the error of one row, in tolerances: the mean over many rows would hide one bad row.
ROW_FACTOR = 20.0
# Where zeros are expected the relative error is undefined: entries up to this many tolerances count as zero.
ZERO_BOUND = 1e-2

Tolerance = float | Mapping[torch.dtype, float] | None


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected), in float64; if expected is all zeros, 0 if actual is too, else infinite.

    >>> relative_rms(torch.tensor([3.0, 4.0]) * 0.9, torch.tensor([3.0, 4.0]))  # doctest: +ELLIPSIS
    0.1000000...
    """
    error, size = _rms(_double(actual) - _double(expected)), _rms(_double(expected))
    return error / size if size else (torch.inf if error else 0.0)


def assert_matches(
    actual: Any, expected: Any, *, tolerance: Tolerance = None, scale: float = 0.0, name: str = ""
) -> None:
    """Raises AssertionError unless `actual` equals `expected` up to the rounding of its dtype.

        rms(actual - expected) <= tolerance * max(rms(expected), scale), and no row exceeds 20 times that

    Accepts tensors, None, numbers, and dataclasses, tuples, lists and dicts of them. Shapes must be equal; integers and
    bools exact; NaN and infinities in the same places; zeros zero. `expected` may be wider (float64): the dtype of
    `actual` selects the tolerance.

    tolerance  a number, or a table by dtype; None: TOLERANCES
    scale      magnitude of the terms of a sum. Terms of size 1 may cancel to 0.01 and keep the rounding error of the
               terms, as in tiny tensors and in gradients that are zero except for rounding: pass scale=1.0 there

    >>> assert_matches(torch.ones(3) + 1e-7, torch.ones(3, dtype=torch.float64))
    >>> assert_matches(torch.ones(3) * 0.6, torch.ones(3), name="y")
    Traceback (most recent call last):
    AssertionError: y: relative RMS error 0.4 > 2e-06; torch.float32 [3]; worst at [0]: got 0.6000000238418579, expected 1.0
    """  # noqa: E501
    place = name or "value"
    if isinstance(expected, Tensor) or isinstance(actual, Tensor):
        if not (isinstance(expected, Tensor) and isinstance(actual, Tensor)):
            raise AssertionError(f"{place}: got {_kind(actual)}, expected {_kind(expected)}")
        _assert_tensor(place, actual.detach(), expected.detach(), tolerance, scale)
    elif dataclasses.is_dataclass(expected) or isinstance(expected, Mapping | tuple | list):
        got, wanted = _parts(actual), _parts(expected)
        if type(actual) is not type(expected) or got.keys() != wanted.keys():
            raise AssertionError(
                f"{place}: got {_kind(actual)} of {list(got)}, expected {_kind(expected)} of {list(wanted)}"
            )
        for key in wanted:
            assert_matches(
                got[key], wanted[key], tolerance=tolerance, scale=scale, name=f"{name}.{key}" if name else str(key)
            )
    elif type(actual) is not type(expected) or actual != expected:
        raise AssertionError(f"{place}: got {actual!r}, expected {expected!r}")


def _parts(value: Any) -> dict[Any, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return (
        dict(value) if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, tuple | list) else {}
    )


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "None"


def _assert_tensor(name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance, scale: float) -> None:
    what = f"{actual.dtype} {list(actual.shape)}"
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (actual, expected)]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"{name}: {actual.dtype}, expected a dtype of the kind of {expected.dtype}")
    if not actual.is_floating_point():
        _assert_exact(name, what, actual.cpu(), expected.cpu())
        return
    limit = _tolerance_of(actual.dtype, tolerance)
    got, wanted = _double(actual), _double(expected)
    _assert_same_non_finite(name, what, got, wanted)
    got, wanted = (torch.where(wanted.isfinite(), t, 0.0) for t in (got, wanted))
    _assert_close(name, what, got, wanted, limit, scale)


def _tolerance_of(dtype: torch.dtype, tolerance: Tolerance) -> float:
    if isinstance(tolerance, int | float):
        return float(tolerance)
    table = TOLERANCES if tolerance is None else tolerance
    if dtype not in table:
        raise AssertionError(f"{dtype} has no tolerance in the table; expected tolerance=")
    return table[dtype]


def _assert_exact(name: str, what: str, got: Tensor, wanted: Tensor) -> None:
    wrong = got != wanted
    if wrong.any():
        count = f"{int(wrong.sum())} of {wrong.numel()}"
        raise AssertionError(
            f"{name}: {count} entries differ, where all must be equal; {what}; {_worst(wrong, got, wanted)}"
        )


def _assert_same_non_finite(name: str, what: str, got: Tensor, wanted: Tensor) -> None:
    different = (got.isnan() != wanted.isnan()) | (got.isinf() != wanted.isinf()) | (got.isinf() & (got != wanted))
    if different.any():
        where = _worst(different, got, wanted)
        raise AssertionError(
            f"{name}: NaN or infinity in {int(different.sum())} places where they differ; {what}; {where}"
        )


def _assert_close(name: str, what: str, got: Tensor, wanted: Tensor, limit: float, scale: float) -> None:
    difference = got - wanted
    size = max(_rms(wanted), scale)
    worst = _worst(difference.abs(), got, wanted)
    if size == 0.0:
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        if largest > limit * ZERO_BOUND:
            raise AssertionError(
                f"{name}: zeros expected, but entries are up to {largest:.3g} > {limit * ZERO_BOUND:.3g}; {what}; "
                f"{worst}"
            )
        return
    error = _rms(difference) / size
    if error > limit:
        raise AssertionError(f"{name}: relative RMS error {error:.3g} > {limit:.3g}; {what}; {worst}")
    rows = difference.reshape(-1, difference.shape[-1]) if difference.ndim > 1 else difference.reshape(-1, 1)
    row_error = float(rows.square().mean(-1).sqrt().max()) / size if rows.numel() else 0.0
    if row_error > limit * ROW_FACTOR:
        raise AssertionError(
            f"{name}: relative RMS error of one row {row_error:.3g} > {limit * ROW_FACTOR:.3g}; {what}; {worst}"
        )


def _worst(badness: Tensor, got: Tensor, wanted: Tensor) -> str:
    if badness.numel() == 0:
        return "no entries"
    at = tuple(int(i) for i in torch.unravel_index(badness.to(torch.float64).argmax(), badness.shape))
    return f"worst at {list(at)}: got {got[at].item()}, expected {wanted[at].item()}"


def _double(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0
