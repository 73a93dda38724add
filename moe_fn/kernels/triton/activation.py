# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""moe_fn.stages._activation for kernels: the value and the exact derivative, every choice a constexpr, everything in
float32.

Comparisons are written with `tl.where` and not with `tl.minimum`/`tl.maximum`: those drop NaN, torch's clamp and relu
keep it.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh on every target, relative error below 3e-7: `tl` has none, and 2 * sigmoid(2x) - 1 loses all
    digits near 0.
    """
    z = x * x
    # the odd polynomial of Cephes' tanhf for |x| < 0.625
    p = (
        ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    ) * z - 3.33332819422e-1
    near = p * z * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)  # exp may be inf: 1 - 2 / inf is right
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _function(g, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, GATE_CAP: tl.constexpr):
    """f(g)."""
    if FUNCTION == "silu":
        return g * tl.sigmoid(ALPHA * g)
    elif FUNCTION == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2z), without the cancellation
        return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif FUNCTION == "relu":
        return tl.where(g <= 0, 0.0, g)
    elif FUNCTION == "relu2":
        r = tl.where(g <= 0, 0.0, g)
        return r * r
    else:
        tl.static_assert(FUNCTION == "situ", "an ActivationConfig.function that the kernels do not know")
        return GATE_CAP * tanh(g / GATE_CAP) * tl.sigmoid(g)


@triton.jit
def _slope(g, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, GATE_CAP: tl.constexpr):
    """f'(g)."""
    if FUNCTION == "silu":
        s = tl.sigmoid(ALPHA * g)
        return s * (1.0 + ALPHA * g * (1.0 - s))
    elif FUNCTION == "gelu":
        return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif FUNCTION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return s + g * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    elif FUNCTION == "relu":
        return tl.where(g <= 0, 0.0, 1.0)
    elif FUNCTION == "relu2":
        return 2.0 * tl.where(g <= 0, 0.0, g)
    else:
        tl.static_assert(FUNCTION == "situ", "an ActivationConfig.function that the kernels do not know")
        t, s = tanh(g / GATE_CAP), tl.sigmoid(g)
        return s * ((1.0 - t * t) + GATE_CAP * t * (1.0 - s))


@triton.jit
def _factor(up, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr, UP_CAP: tl.constexpr):
    """What f(gate) is multiplied with."""
    if LIMIT is not None:
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_CAP is not None:
        up = UP_CAP * tanh(up / UP_CAP)
    return up + UP_OFFSET


@triton.jit
def act(
    gate,
    up,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_OUTPUT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    GATE_CAP: tl.constexpr,
    UP_CAP: tl.constexpr,
):
    """`activate` of gate and up, float32 in and out; `up` is ignored when not GATED."""
    if not GATED:
        return _function(gate, FUNCTION, ALPHA, GATE_CAP)
    if LIMIT is not None and not LIMIT_OUTPUT:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    value = _function(gate, FUNCTION, ALPHA, GATE_CAP)
    if LIMIT is not None and LIMIT_OUTPUT:
        value = tl.where(value > LIMIT, LIMIT, value)
    return value * _factor(up, LIMIT, UP_OFFSET, UP_CAP)


@triton.jit
def act_backward(
    d,
    gate,
    up,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_OUTPUT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    GATE_CAP: tl.constexpr,
    UP_CAP: tl.constexpr,
):
    """The gradient d of `act` pulled back to (gate, up), as torch's autograd does it; the second one means nothing when
    not GATED.
    """
    if not GATED:
        d_gate = d * _slope(gate, FUNCTION, ALPHA, GATE_CAP)
        return d_gate, d_gate
    inner = gate
    if LIMIT is not None and not LIMIT_OUTPUT:
        inner = tl.where(gate > LIMIT, LIMIT, gate)
    value = _function(inner, FUNCTION, ALPHA, GATE_CAP)
    d_gate = d * _factor(up, LIMIT, UP_OFFSET, UP_CAP) * _slope(inner, FUNCTION, ALPHA, GATE_CAP)
    clipped = up
    if LIMIT is not None:
        clipped = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        d_gate = tl.where((value if LIMIT_OUTPUT else gate) <= LIMIT, d_gate, 0.0)
        value = tl.where(value > LIMIT, LIMIT, value) if LIMIT_OUTPUT else value
    d_up = d * value
    if UP_CAP is not None:
        t = tanh(clipped / UP_CAP)
        d_up *= 1.0 - t * t
    if LIMIT is not None:
        d_up = tl.where(tl.abs(up) <= LIMIT, d_up, 0.0)
    return d_gate, d_up
