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
def _function(g, A: tl.constexpr):
    """f(g)."""
    if A.function == "silu":
        return g * tl.sigmoid(A.alpha * g)
    elif A.function == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif A.function == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2z), without the cancellation
        return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif A.function == "relu":
        return tl.where(g <= 0, 0.0, g)
    elif A.function == "relu2":
        r = tl.where(g <= 0, 0.0, g)
        return r * r
    else:
        tl.static_assert(A.function == "situ", "an ActivationConfig.function that the kernels do not know")
        return A.gate_cap * tanh(g / A.gate_cap) * tl.sigmoid(g)


@triton.jit
def _slope(g, A: tl.constexpr):
    """f'(g)."""
    if A.function == "silu":
        s = tl.sigmoid(A.alpha * g)
        return s * (1.0 + A.alpha * g * (1.0 - s))
    elif A.function == "gelu":
        return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif A.function == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return s + g * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    elif A.function == "relu":
        return tl.where(g <= 0, 0.0, 1.0)
    elif A.function == "relu2":
        return 2.0 * tl.where(g <= 0, 0.0, g)
    else:
        tl.static_assert(A.function == "situ", "an ActivationConfig.function that the kernels do not know")
        t, s = tanh(g / A.gate_cap), tl.sigmoid(g)
        return s * ((1.0 - t * t) + A.gate_cap * t * (1.0 - s))


@triton.jit
def _factor(up, A: tl.constexpr):
    """What f(gate) is multiplied with."""
    if A.limit is not None:
        up = tl.where(up > A.limit, A.limit, tl.where(up < -A.limit, -A.limit, up))
    if A.up_cap is not None:
        up = A.up_cap * tanh(up / A.up_cap)
    return up + A.up_offset


@triton.jit
def act(gate, up, A: tl.constexpr):
    """`activate` of gate and up by the ActivationConfig A, float32 in and out; not gated, `up` is ignored."""
    if not A.gated:
        return _function(gate, A)
    if A.limit is not None and A.limit_at == "input":
        gate = tl.where(gate > A.limit, A.limit, gate)
    value = _function(gate, A)
    if A.limit is not None and A.limit_at == "output":
        value = tl.where(value > A.limit, A.limit, value)
    return value * _factor(up, A)


@triton.jit
def act_backward(d, gate, up, A: tl.constexpr):
    """The gradient d of `act` pulled back to (gate, up), as torch's autograd does it; the second one means nothing
    where A is not gated.
    """
    if not A.gated:
        d_gate = d * _slope(gate, A)
        return d_gate, d_gate
    inner = gate
    if A.limit is not None and A.limit_at == "input":
        inner = tl.where(gate > A.limit, A.limit, gate)
    value = _function(inner, A)
    d_gate = d * _factor(up, A) * _slope(inner, A)
    clipped = up
    if A.limit is not None:
        clipped = tl.where(up > A.limit, A.limit, tl.where(up < -A.limit, -A.limit, up))
        d_gate = tl.where((value if A.limit_at == "output" else gate) <= A.limit, d_gate, 0.0)
        value = tl.where(value > A.limit, A.limit, value) if A.limit_at == "output" else value
    d_up = d * value
    if A.up_cap is not None:
        t = tanh(clipped / A.up_cap)
        d_up *= 1.0 - t * t
    if A.limit is not None:
        d_up = tl.where(tl.abs(up) <= A.limit, d_up, 0.0)
    return d_gate, d_up
