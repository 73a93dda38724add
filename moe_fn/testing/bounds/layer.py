"""Error bound of the whole layer for one problem, by running error analysis."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import LatentWeights, MoEWeights, RouterWeights, Routing
from moe_fn.reference.routing import route_comparing_in
from moe_fn.reference.tensors import float64_weights
from moe_fn.testing.bounds.ball import (
    UNITS,
    Ball,
    Units,
    exact,
    norm,
    plus,
    product,
    scaled,
    stored,
    summed,
    times,
    wide,
)
from moe_fn.testing.bounds.experts import Outcome, Slots, expert_rows, shared_rows
from moe_fn.testing.bounds.routing import gate_logits, routing_weights
from moe_fn.testing.problem import MoEProblem


@dataclass(frozen=True)
class Bound:
    """The possible outputs of a layer in a dtype.

    value       [..., H] float64
    radius      [..., H]: |y - value| <= radius for every right y; infinite where a divisor may be zero
    logits      [T, num_logits]: of the gate inside the layer, or as given
    expert_ids  [T, top_k]: the reference's choice
    tied        a code of rounded inputs is undecided: right codes may differ by a whole step, which radius covers
    jumps       a derivative is undecided (relu or a limit within the radius): gradients may differ by more than
                rounding
    """

    value: Tensor
    radius: Tensor
    logits: Ball
    expert_ids: Tensor
    tied: bool
    jumps: bool


def error_bound(problem: MoEProblem, ranks: int = 1, logits: Ball | None = None) -> Bound:
    """The output of a problem in float64, and a bound of the error of a layer that rounds by the contract, op by op.

        |y - value| <= radius, of products:   gamma_(n+1) |W| |x| + |W| r_x + u |y|
                               of functions:  f([x - r, x + r])
                               of sums:       gamma_k sum |w o|

    Running error analysis (Wilkinson; Higham, Accuracy and Stability of Numerical Algorithms, 3.3): every value carries
    its bound through the same formulas. The contract: sums in float32 or wider in any order; values between ops are
    rounded to the dtype of x. ranks: the number of ranks that share the sums, each of which stores its part. logits:
    the router's input, instead of the problem's. The chosen experts are the reference's: a choice has no error bound.

    Laws
        The error of the layer is within its bound.

    >>> import torch, moe_fn
    >>> from moe_fn.testing import weights_for
    >>> config = moe_fn.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)
    >>> x, logits = torch.randn(3, 8), torch.randn(3, 4)
    >>> problem = MoEProblem(config=config, weights=weights_for(config), x=x, logits=logits)
    >>> bound = error_bound(problem)
    >>> bool(((moe_fn.moe_forward(config, problem.weights, x, logits) - bound.value).abs() <= bound.radius).all())
    True
    """
    config, units = problem.config, UNITS[problem.x.dtype]
    weights = float64_weights(problem.weights)
    router = weights.router or RouterWeights()
    real = _real_tokens(problem)
    x = exact(_real_rows(problem.x, config.hidden_size, real))
    v = _routed_input(units, config, weights, x)
    logits = _logits(units, problem, router, x, v, real) if logits is None else logits
    chosen, ids = _choices(problem, logits)
    w, shared_w = routing_weights(units, config, router, logits, chosen.expert_ids, chosen.weights)
    routed = _routed(units, config, weights, v, ids, w, _adapters(problem, len(ids)), ranks)
    y, jumps = _scaled_and_shared(
        units, config, weights, x, routed.ball, shared_w, problem.x.dtype == torch.float16, ranks
    )
    y = _zero_experts(units, config, weights, x, y, ids, w)
    if config.norms is not None and config.norms.output and weights.output_norm is not None:
        y = stored(units, wide(units, times(norm(units, y, config.norms.epsilon), exact(weights.output_norm))))
    value, radius = (torch.where(real.unsqueeze(-1), t, 0).reshape(problem.x.shape) for t in (y.value, y.radius))
    return Bound(value, radius, logits, ids, routed.tied, routed.jumps or jumps)


def _choices(problem: MoEProblem, logits: Ball) -> tuple[Routing, Tensor]:
    """The routing without a capacity, and the ids [T, top_k] with it."""
    config, dtype = problem.config, problem.x.dtype if problem.logits is None else problem.logits.dtype
    z = logits.value.reshape(*problem.x.shape[:-1], config.num_logits)
    boundless = dataclasses.replace(config, router=dataclasses.replace(config.router, capacity=None))
    chosen, left = (
        route_comparing_in(dtype, c, problem.weights, z, problem.token_ids, problem.token_mask)
        for c in (boundless, config)
    )
    return chosen, left.expert_ids


def _real_rows(x: Tensor, width: int, real: Tensor) -> Tensor:
    return torch.where(real.unsqueeze(-1), x.to(torch.float64).reshape(-1, width), 0)


def _adapters(problem: MoEProblem, tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.int64) if problem.adapter_ids is None else problem.adapter_ids.flatten()


def _logits(units: Units, problem: MoEProblem, router: RouterWeights, x: Ball, v: Ball, real: Tensor) -> Ball:
    if problem.logits is not None:
        return exact(_real_rows(problem.logits, problem.config.num_logits, real))
    return gate_logits(units, problem.config, router, _gate_input(units, problem.config, x, v))


def _gate_input(units: Units, config: MoEConfig, x: Ball, v: Ball) -> Ball:
    if config.router.gate_input == "transformed":
        return v
    normed = config.norms is not None and config.norms.gate
    return stored(units, norm(units, x, config.norms.epsilon)) if normed and config.norms is not None else x


def logits_again(problem: MoEProblem, logits: Tensor) -> Ball:
    """Logits of the gate inside the layer, with a bound of their difference in another batch, where products may be
    summed in another order.
    """
    config, units = problem.config, UNITS[problem.x.dtype]
    weights = float64_weights(problem.weights)
    real = _real_tokens(problem)
    x = exact(_real_rows(problem.x, config.hidden_size, real))
    seen = _gate_input(units, config, x, _routed_input(units, config, weights, x))
    radius = 2 * gate_logits(units, config, weights.router or RouterWeights(), exact(seen.value)).radius
    return Ball(_real_rows(logits, config.num_logits, real), radius)


def _real_tokens(problem: MoEProblem) -> Tensor:
    tokens = problem.x[..., 0].numel()
    return torch.ones(tokens, dtype=torch.bool) if problem.token_mask is None else problem.token_mask.flatten()


def _routed_input(units: Units, config: MoEConfig, weights: MoEWeights, x: Ball) -> Ball:
    v = x
    if config.norms is not None and config.norms.input and weights.input_norm is not None:
        v = stored(units, wide(units, times(norm(units, v, config.norms.epsilon), exact(weights.input_norm))))
    if config.latent is not None and weights.latent is not None:
        v = _linear(units, weights.latent.input, weights.latent.input_bias, v)
        v = _latent_norm(units, config, weights.latent.input_norm, v)
    return v.map(lambda t: torch.nn.functional.pad(t, (0, config.hidden_padding)))


def _linear(units: Units, matrix: Tensor, bias: Tensor | None, v: Ball) -> Ball:
    y = stored(units, product(units, exact(matrix), v))
    return y if bias is None else stored(units, plus(y, exact(bias)))


def _latent_norm(units: Units, config: MoEConfig, scale: Tensor | None, v: Ball) -> Ball:
    if scale is None or config.latent is None:
        return v
    return stored(units, wide(units, times(norm(units, v, config.latent.norm_epsilon), exact(scale))))


def _routed(
    units: Units, config: MoEConfig, weights: MoEWeights, v: Ball, ids: Tensor, w: Ball, adapters: Tensor, ranks: int
) -> Outcome:
    """The sum over slots of w * expert(v), or of expert(w * v)."""
    present = (ids >= 0) & (ids < config.num_experts)
    slots = Slots(torch.where(present, ids, 0), present, adapters)
    each = v.map(lambda t: t.unsqueeze(1).expand(-1, config.top_k, -1))
    of_slot = w.map(lambda t: t.unsqueeze(-1))
    on_input = config.router.weight_on == "input"
    seen = stored(units, wide(units, times(each, stored(units, of_slot)))) if on_input else each
    rows = expert_rows(units, config, weights, seen, slots, units != UNITS[torch.float64], ranks)
    counted = rows.ball if on_input else wide(units, times(rows.ball, of_slot))
    some = present.unsqueeze(-1)
    counted = Ball(torch.where(some, counted.value, 0), torch.where(some, counted.radius, 0))
    total = stored(units, summed(units, counted, 1)).map(lambda t: t[..., : config.routed_size])
    return dataclasses.replace(rows, ball=total)


def _scaled_and_shared(
    units: Units,
    config: MoEConfig,
    weights: MoEWeights,
    x: Ball,
    y: Ball,
    of_router: Ball | None,
    is_float16: bool,
    ranks: int,
) -> tuple[Ball, bool]:
    """Applies the scale on the output, the projection from the latent space, and the shared experts."""
    factor, scale_on = config.router.routed_scaling_factor, config.router.scale_on
    scale_shared = scale_on == "output_float16_safe" and is_float16 and config.shared is not None
    y = stored(units, scaled(y, factor)) if scale_on != "weights" and not scale_shared else y
    y = _routed_output(units, config, weights.latent, y)
    if config.shared is None or weights.shared is None:
        return y, False
    shared = shared_rows(units, config.shared, weights.shared, x, of_router, ranks)
    addend = stored(units, scaled(shared.ball, 1 / factor)) if scale_shared else shared.ball
    both = stored(units, wide(units, plus(y, addend)))
    return scaled(both, 0.5) if config.shared.combine == "average" else both, shared.jumps


def _routed_output(units: Units, config: MoEConfig, latent: LatentWeights | None, y: Ball) -> Ball:
    if config.latent is None or latent is None:
        return y
    return _linear(units, latent.output, latent.output_bias, _latent_norm(units, config, latent.output_norm, y))


def _zero_experts(units: Units, config: MoEConfig, weights: MoEWeights, x: Ball, y: Ball, ids: Tensor, w: Ball) -> Ball:
    zero, number = config.zero_experts, ids - config.num_experts
    if zero is None or zero.kind == "zero":
        return y
    chosen = (number >= 0) & (number < zero.count)
    w = Ball(torch.where(chosen, w.value, 0), torch.where(chosen, w.radius, 0)).map(lambda t: t.unsqueeze(-1))
    vectors = x.map(lambda t: t.unsqueeze(1))
    if zero.kind == "constant" and weights.constants is not None:
        vectors = exact(weights.constants[torch.where(chosen, number, 0)])
    added = wide(units, summed(units, wide(units, times(w, vectors), 2), 1))
    return stored(units, wide(units, plus(y, added), 2))
