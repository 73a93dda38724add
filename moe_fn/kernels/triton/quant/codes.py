# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Decodes quantized weights and their scales to float32, exactly for every scheme and target.

Floating-point codes are shifted to the exponent and mantissa of a float32 with their sign, and multiplied by a power of
two that corrects the exponent's bias; subnormal codes are subnormal float32 values before that. So no target needs an
instruction for e4m3, which sm_80 does not have. Integers are or-ed into the mantissa of 2^23: an OR and an ADD, while
conversion instructions run at a quarter of their rate.
"""

import triton
import triton.language as tl


@triton.jit
def e4m3(q):
    """float32 values of e4m3fn codes (uint8)."""
    bits = (q.to(tl.int32) << 24 >> 4) & -0x78100000  # 0x87F00000
    return tl.where((q & 0x7F) == 0x7F, float("nan"), bits.to(tl.float32, bitcast=True) * 1.329227995784916e36)  # 2^120


@triton.jit
def e2m1(q):
    """float32 values of e2m1 codes 0 .. 15: 0, .5, 1, 1.5, 2, 3, 4, 6, and from 8 on the negative ones."""
    bits = (q.to(tl.int32) << 28 >> 6) & -0x7E400000  # 0x81C00000
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def whole(q, zero):
    """q - zero in float32 for integers q in 0 .. 255."""
    return (q.to(tl.int32) ^ 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)  # 2^23


@triton.jit
def decode(q, zero, SCHEME: tl.constexpr):
    """float32 values of codes (uint8; 4-bit codes are unpacked before); zero is used for integers only, and int8 is
    stored in two's complement.
    """
    if SCHEME == "fp8_e4m3":
        return e4m3(q) if q.dtype == tl.uint8 else q.to(tl.float32)
    elif SCHEME == "e2m1":
        return e2m1(q)
    elif SCHEME == "int8":
        return whole(q.to(tl.int32) ^ 0x80, zero)
    else:
        tl.static_assert(SCHEME == "uint8" or SCHEME == "int4", "a scheme that the kernels do not know")
        return whole(q, zero)


@triton.jit
def nibbles(q, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """[ROWS, BYTES] bytes to [ROWS, 2 * BYTES] codes, the low nibble first."""
    return tl.reshape(tl.join(q & 15, q >> 4), (ROWS, 2 * BYTES))


@triton.jit
def scale_value(s, FORM: tl.constexpr):
    """float32 values of scales: floats, e8m0 codes (2^(s - 127), NaN for 255) or e4m3 codes."""
    if FORM == "e8m0":
        bits = tl.where(s == 0, 0x00400000, s.to(tl.int32) << 23)  # 2^-127 is subnormal
        return tl.where(s == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    elif FORM == "e4m3":
        return e4m3(s)
    else:
        return s.to(tl.float32)
