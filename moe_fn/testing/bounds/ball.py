"""Ball arithmetic on tensors: values with bounds of their floating-point error.

A `Ball` has the value in float64 and a radius: the result of any computation that rounds as in `Units` is within it.
Functions here do not add rounding errors, except `rounded`, `wide` and `stored`, which are called where the layer
rounds, and sums and products. Model of rounded operations (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., 2.2 and 3.1):

    fl(a op b) = (a op b)(1 + d), |d| <= u
    |fl(sum of n products) - exact| <= gamma_n * sum |w| |x|,  gamma_n = n u / (1 - n u)

The second holds for every order of summation, so for every kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """Unit roundoffs of stored values (in the layer's dtype) and of computed ones (in float32 or wider), and the
    absolute error near 0.
    """

    stored: float
    wide: float
    least: float  # half the smallest subnormal, or the smallest normal number where subnormals are flushed to zero


UNITS = {
    torch.float64: Units(2.0**-53, 2.0**-53, 2.0**-1022),
    torch.float32: Units(2.0**-24, 2.0**-24, 2.0**-126),
    torch.bfloat16: Units(2.0**-8, 2.0**-24, 2.0**-126),
    torch.float16: Units(2.0**-11, 2.0**-24, 2.0**-25),
}


@dataclass(frozen=True)
class Ball:
    """value and radius, float64 tensors that broadcast; radius 0 means exact, an infinite radius means no bound."""

    value: Tensor
    radius: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Ball":
        """The ball after a rearrangement: a view, a gather, a selection."""
        return Ball(change(self.value), change(self.radius.expand_as(self.value)))


def exact(value: Tensor) -> Ball:
    """The ball of an exact value."""
    return Ball(value, torch.zeros_like(value))


def gamma(terms: int, unit: float) -> float:
    """n u / (1 - n u).

    >>> gamma(10, 2.0**-24) / 2.0**-24
    10.000005960468...
    """
    return terms * unit / (1 - terms * unit)


def rounded(a: Ball, unit: float, least: float = 0.0) -> Ball:
    """The ball after one rounding."""
    return Ball(a.value, a.radius + unit * (a.value.abs() + a.radius) + least)


def wide(units: Units, a: Ball, operations: int = 1) -> Ball:
    """The ball after roundings of a number of operations in float32 (or wider)."""
    return rounded(a, gamma(operations, units.wide))


def stored(units: Units, a: Ball) -> Ball:
    """The ball after rounding to the layer's dtype."""
    return rounded(a, units.stored, units.least)


def plus(a: Ball, b: Ball) -> Ball:
    """a + b, not rounded."""
    return Ball(a.value + b.value, a.radius + b.radius)


def times(a: Ball, b: Ball) -> Ball:
    """a * b, not rounded."""
    return Ball(a.value * b.value, a.value.abs() * b.radius + b.value.abs() * a.radius + a.radius * b.radius)


def over(a: Ball, b: Ball) -> Ball:
    """a / b, not rounded, for positive b; the radius is infinite where b may be zero.

    >>> over(exact(torch.tensor(1.0)), Ball(torch.tensor(2.0), torch.tensor(3.0))).radius
    tensor(inf)
    """
    least, quotient = b.value - b.radius, a.value / b.value
    radius = (a.radius + quotient.abs() * b.radius) / least
    return Ball(quotient, torch.where(least > 0, radius, torch.inf))


def scaled(a: Ball, factor: float) -> Ball:
    """a times a number, not rounded."""
    return Ball(a.value * factor, a.radius * abs(factor))


def product(units: Units, matrix: Ball, vector: Ball) -> Ball:
    """matrix [..., out, in] times vector [..., in], accumulated in float32 or wider in any order, not yet stored."""
    terms = vector.value.shape[-1]
    magnitude, size = matrix.value.abs() + matrix.radius, vector.value.abs() + vector.radius
    radius = _apply(matrix.value.abs(), vector.radius) + _apply(matrix.radius, size)
    return Ball(
        _apply(matrix.value, vector.value),
        radius + gamma(terms + 1, units.wide) * _apply(magnitude, size) + units.least,
    )


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def summed(units: Units, a: Ball, dim: int) -> Ball:
    """The sum over a dim, in any order."""
    size = (a.value.abs() + a.radius).sum(dim)
    return Ball(a.value.sum(dim), a.radius.sum(dim) + gamma(max(a.value.shape[dim] - 1, 0), units.wide) * size)


def monotone(a: Ball, function: Callable[[Tensor], Tensor], curvature: float = 0.0) -> Ball:
    """function(a), not rounded, bounded by its values at the ends of the interval.

    curvature: a bound of the second derivative, for functions with turning points.

    >>> monotone(Ball(torch.tensor(0.0), torch.tensor(1.0)), torch.relu).radius
    tensor(1.)
    """
    value = function(a.value)
    ends = (function(a.value + sign * a.radius) - value for sign in (1.0, -1.0))
    up, down = (end.abs() for end in ends)
    return Ball(value, torch.maximum(up, down) + curvature * a.radius.square())


def norm(units: Units, a: Ball, epsilon: float) -> Ball:
    """a / sqrt(mean(a^2) + epsilon) over the last dim, in float32 or wider, not yet stored."""
    count = a.value.shape[-1]
    square = wide(units, times(a, a))
    mean = wide(units, scaled(summed(units, square, -1), 1 / count).map(lambda t: t.unsqueeze(-1)), 2)
    low, high = ((mean.value + sign * mean.radius).clamp(min=0) + epsilon for sign in (-1.0, 1.0))
    root = (mean.value + epsilon).rsqrt()
    factor = Ball(root, torch.maximum(low.rsqrt() - root, root - high.rsqrt()))
    return wide(units, times(a, wide(units, factor, 3)))
