# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The router in one launch: logits to expert ids and weights, equal to moe_fn.route if `router_problem` is None.

A row of logits is a row of a tile: groups are padded to a power of two, so that lane g * SIDE + i holds choice
g * SIZE + i and lanes are in the order of ids. The largest keys are chosen, and keys are unique: the high bits are the
score as an integer with the same order, the low bits the lane counted from the end. So ties go to the lowest id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.kernels.triton.activation import tanh
from moe_fn.kernels.triton.support import LANES, lanes_of


@triton.jit
def _finite_or(x, other: tl.constexpr):
    """x where it is finite, else `other`."""
    return tl.where(tl.abs(x) < float("inf"), x, other)


@triton.jit
def _transformed(z, MULTIPLIER: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits times MULTIPLIER, with a tanh softcap; scores are computed from them."""
    if MULTIPLIER != 1.0:
        z = z * MULTIPLIER
    if SOFTCAP is not None:
        z = SOFTCAP * tanh(z / SOFTCAP)
    return z


@triton.jit
def _score(z, SCORING: tl.constexpr):
    """Scores of z [rows, lanes], 0 where they are not finite; softmax is along the lanes, without those of -inf."""
    if SCORING == "softmax":
        # A NaN or infinite logit makes the sum NaN, and so the whole row 0, as in torch.
        e = tl.exp(z - tl.max(z, 1)[:, None])
        score = (
            e * tl.div_rn(1.0, tl.sum(e, 1))[:, None]
        )  # the sum is between 1 and the number of lanes, so its inverse is accurate
    elif SCORING == "sigmoid":
        score = tl.div_rn(1.0, 1.0 + tl.exp(-z))
    elif SCORING == "sqrtsoftplus":
        y = tl.exp(-tl.abs(z))
        u = 1.0 + y  # for small y the sum loses digits of y; the quotient below restores them
        log1p = tl.where(u == 1.0, y, tl.log(u) * tl.div_rn(y, tl.where(u == 1.0, 1.0, u - 1.0)))
        score = tl.sqrt_rn(tl.where(z > 0, z, 0.0) + log1p)
    else:
        tl.static_assert(SCORING == "identity", "a scoring that the kernel does not know")
        score = z
    return _finite_or(score, 0.0)


@triton.jit
def _kept(values, ROWS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, SIDE: tl.constexpr):
    """Whether each lane is in one of the KEPT best groups: bool [ROWS, GROUPS * SIDE].

    A group's value is its largest score, or the sum of its two largest.
    """
    by_group = tl.reshape(values, (ROWS, GROUPS, SIDE))
    worth = tl.sum(tl.topk(by_group, 2), 2) if TOP2 else tl.max(by_group, 2)
    group = tl.arange(0, GROUPS)
    mine, other = worth[:, :, None], worth[:, None, :]
    earlier = group[None, None, :] < group[None, :, None]
    rank = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), 2)
    rank = tl.broadcast_to(rank[:, :, None], (ROWS, GROUPS, SIDE))
    return tl.reshape(rank, (ROWS, GROUPS * SIDE)) < KEPT


@triton.jit
def _best(values, lane, valid, LANES: tl.constexpr, BEST: tl.constexpr):
    """Lanes of the BEST largest valid values, descending: int32 [rows, BEST]. values [rows, LANES] has no NaN."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (ordered << 32) | (LANES - 1 - lane).to(tl.int64)
    key = tl.where(valid, key, -(2**63))  # a config has at least top_k valid lanes: invalid ones are not stored
    return (LANES - 1 - (tl.topk(key, BEST) & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _normalised(w, ORDER: tl.constexpr, EPSILON: tl.constexpr, MINIMUM: tl.constexpr):
    """w divided by its norm along the row, or w where the norm is 0."""
    total = tl.sum(tl.abs(w), 1) if ORDER == 1.0 else tl.sqrt_rn(tl.sum(w * w, 1))
    total = tl.maximum(total + EPSILON, MINIMUM)
    return tl.div_rn(w, tl.where(total > 0, total, 1.0)[:, None])


@triton.jit
def _route_kernel(
    logits, bias, ids, weights, T, stride,
    CHOICES: tl.constexpr, TOP_K: tl.constexpr, SCORING: tl.constexpr, AFTER: tl.constexpr, BIAS: tl.constexpr,
    MULTIPLIER: tl.constexpr, SOFTCAP: tl.constexpr, COUNT: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    FILL: tl.constexpr,
    RENORMALIZE: tl.constexpr, ORDER: tl.constexpr, EPSILON: tl.constexpr, MINIMUM: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIDE: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Routes ROWS tokens per program.

    BIAS: "none", or what the correction bias is added to; COUNT is the number of groups (1: none), GROUPS its padded
    number.
    """
    SIZE: tl.constexpr = CHOICES // COUNT
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, GROUPS * SIDE)
    choice = lane // SIDE * SIZE + lane % SIDE
    valid = ((lane % SIDE < SIZE) & (lane // SIDE < COUNT))[None, :]
    z = tl.load(logits + t.to(tl.int64)[:, None] * stride + choice[None, :], mask=(t < T)[:, None] & valid, other=0.0)
    z = tl.where(valid, _transformed(z.to(tl.float32), MULTIPLIER, SOFTCAP), float("-inf"))
    scores = z if AFTER and BIAS != "scores" else _score(z, SCORING)
    values = z if BIAS == "logits" else scores
    if bias is not None:
        values += tl.load(bias + choice[None, :], mask=valid, other=0.0).to(tl.float32)
    values = _finite_or(
        values, -3.4028234663852886e38
    )  # below any finite value, but above choices of groups that are not kept
    values = tl.where(valid, values, float("-inf"))
    if COUNT > 1:
        kept = _kept(values, ROWS, GROUPS, KEPT, TOP2, SIDE)
        values = tl.where(kept, values, FILL)
        scores = tl.where(kept, scores, 0.0) if BIAS == "none" else scores
    best = _best(values, lane[None, :], valid, GROUPS * SIDE, BEST)
    j = tl.arange(0, BEST)
    chosen = (j < TOP_K)[None, :]
    w = tl.gather(z if AFTER else scores, best, 1)
    w = tl.where(chosen, w, float("-inf") if AFTER else 0.0)
    if AFTER:
        w = tl.where(chosen, _score(w, SCORING), 0.0)
    if RENORMALIZE:
        w = _normalised(w, ORDER, EPSILON, MINIMUM)
    place = t.to(tl.int64)[:, None] * TOP_K + j[None, :]
    mask = (t < T)[:, None] & chosen
    tl.store(ids + place, (best // SIDE * SIZE + best % SIDE).to(tl.int64), mask=mask)
    tl.store(weights + place, w * SCALE, mask=mask)


def route_top_k(config: MoEConfig, logits: Tensor, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """moe_fn.route in one launch: logits [T, num_choices] to ids int64 [T, top_k], best first, and weights float32 [T,
    top_k].

    correction_bias is [num_choices], added in float32, or None. The config must have no `router_problem`; the result is
    not differentiable.
    """
    num_tokens, top_k = logits.shape[0], config.top_k
    ids = logits.new_empty((num_tokens, top_k), dtype=torch.int64)
    weights = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    if num_tokens == 0:
        return ids, weights
    groups, side = lanes_of(config)
    rows = min(32, LANES // (groups * side))
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    _route_kernel[(triton.cdiv(num_tokens, rows),)](
        logits, None if correction_bias is None else correction_bias.contiguous(), ids, weights, num_tokens,
        logits.stride(0),
        **_constants(config), ROWS=rows, GROUPS=groups, SIDE=side, BEST=max(2, triton.next_power_of_2(top_k)),
        num_warps=4, enable_fp_fusion=False,  # a fused multiply-add would break ties between rounded values
    )  # fmt: skip
    return ids, weights


def _constants(config: MoEConfig) -> dict[str, str | bool | int | float | None]:
    """The kernel's constants, from the config."""
    router, groups = config.router, config.router.groups
    return {
        "CHOICES": config.num_choices,
        "TOP_K": config.top_k,
        "SCORING": router.scoring,
        "AFTER": router.scoring_order == "after_top_k",
        "BIAS": router.correction_bias,
        "MULTIPLIER": router.logit_multiplier,
        "SOFTCAP": router.logit_softcap,
        "COUNT": 1 if groups is None else groups.count,
        "KEPT": 1 if groups is None else groups.top_k,
        "TOP2": groups is not None and groups.score == "top2_sum",
        "FILL": 0.0 if groups is not None and groups.fill == "zero" else float("-inf"),
        "RENORMALIZE": router.renormalize,
        "ORDER": router.renormalize_order,
        "EPSILON": router.renormalize_epsilon,
        "MINIMUM": router.renormalize_minimum,
        "SCALE": router.routed_scaling_factor if router.scale_on == "weights" else 1.0,
    }
