"""Planted bugs of the layer: typical mistakes, each of which must break the law that it names.

A law that no bug can break proves nothing.
"""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from moe_fn import balance, checks, forward
from moe_fn.fused import route, routed_experts
from moe_fn.kernels.torch import grouped
from moe_fn.layer import call, chunked, compose, lora, opaque
from moe_fn.ops import arithmetic, grouped_matmul
from moe_fn.parallel import cutting
from moe_fn.records import Routing
from moe_fn.stages import (
    _adapters,
    _routing_weights,
    _scores,
    combine,
    dispatch,
    experts,
    join,
    reduce_and_trunc,
    shared,
    transform,
    zero_experts,
)
from moe_fn.weights import panels, prepare

replace = dataclasses.replace


@dataclass(frozen=True)
class PlantedBug:
    """`function` (as imported) is replaced by `broken(function)` wherever moe_fn uses it; then `law` must fail."""

    law: str
    what: str
    function: Callable[..., Any]
    broken: Callable[[Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def planted(bug: PlantedBug) -> Iterator[None]:
    """A context in which every module of the package that has the function has the broken one instead."""
    broken = bug.broken(bug.function)
    places = [
        (module, name)
        for key, module in sys.modules.items()
        if key.startswith(("moe_fn", "campaign")) and not key.startswith(("moe_fn.reference", "moe_fn.testing"))
        for name, value in vars(module).items()
        if value is bug.function
    ]
    assert places, f"{bug.what}: no module uses the function"
    try:
        for module, name in places:
            setattr(module, name, broken)
        yield
    finally:
        for module, name in places:
            setattr(module, name, bug.function)


def after(change: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A bug in the result: returns change(result, *args)."""
    return lambda f: lambda *args, **kwargs: change(f(*args, **kwargs), *args)


def before(change: Callable[..., tuple[Any, ...]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A bug in the arguments: the function is called with change(*args)."""
    return lambda f: lambda *args, **kwargs: f(*change(*args), **kwargs)


def instead(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A bug that replaces the function by another one."""
    return lambda f: function


def with_router(**changes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A bug that changes options of the caller's router."""
    return before(lambda config, *rest: (replace(config, router=replace(config.router, **changes)), *rest))


def _sum_too_large(total: Any, router: Any, weights: Any) -> Any:
    return total * 1.001


def _swap_first_and_last(routing: Routing, *args: Any) -> Routing:
    return replace(routing, weights=routing.weights.flip(-1))


def _ends_off_by_one(d: Any, *args: Any) -> Any:
    return replace(d, expert_ends=(d.expert_ends - 1).clamp(min=0))


def _rounded_floats(record: Any) -> Any:
    return tree_map(lambda t: t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t, record)


def _unsorted(d: Any, *args: Any) -> Any:
    order = torch.arange(len(d.slot_of_row))
    return replace(d, slot_of_row=order, row_of_slot=order)


def _unstable(d: Any, config: Any, x: Any, routing: Any) -> Any:
    """Reverses the rows of the first expert."""
    n = int(d.expert_ends[0])
    slots = torch.cat([d.slot_of_row[:n].flip(0), d.slot_of_row[n:]])
    return replace(d, slot_of_row=slots, row_of_slot=slots.argsort())


def _padding_first(d: Any, *args: Any) -> Any:
    n = len(d.slot_of_row) - int(d.expert_ends[-1])
    slots = torch.cat([d.slot_of_row[len(d.slot_of_row) - n :], d.slot_of_row[: len(d.slot_of_row) - n]])
    return replace(d, slot_of_row=slots, row_of_slot=slots.argsort())


def _negative_is_expert_zero(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda config, x, routing: f(config, x, replace(routing, expert_ids=routing.expert_ids.clamp(min=0)))


def _writes_into_x(f: Callable[..., Any]) -> Callable[..., Any]:
    def broken(config: Any, weights: Any, x: Any) -> Any:
        x.data.mul_(1.0)
        x.data.add_(1e-3)
        return f(config, weights, x)

    return broken


def _random_bits(y: Any, *args: Any) -> Any:
    return y + 1e-3 * torch.rand_like(y)


def _zero_padding_by_product(x: Any, token_mask: Any) -> Any:
    return x if token_mask is None else x * token_mask.unsqueeze(-1)


def _depends_on_the_batch(y: Any, *args: Any) -> Any:
    return y + 0.01 * y.mean(0, keepdim=True) if len(y) else y


def _depends_on_the_position(y: Any, *args: Any) -> Any:
    return y * (1 + 0.01 * torch.arange(len(y)).unsqueeze(-1)).to(y.dtype)


def _depends_on_the_label(out: Any, config: Any, weights: Any, d: Any) -> Any:
    ends = d.expert_ends.clone()
    return out * torch.where(torch.arange(len(out)) < ends[0], 1.01, 1.0).unsqueeze(-1)


def _drops_the_last_chunk(config: Any, step: Any, carry: Any, x: Any) -> Any:
    tokens, size = x.shape[0], config.chunk_tokens or 1
    carry, pieces = _scan(config, step, carry, x)
    kept = max(tokens - tokens % size, 1) if tokens else 0
    return carry, tuple(torch.cat([p[:kept], torch.zeros_like(p[kept:])]) for p in pieces)


_scan = chunked._scan


def _rows_in_order_of_adapters(f: Callable[..., Any]) -> Callable[..., Any]:
    def broken(by: Any, *rest: Any) -> Any:
        if by is not None and by.row_of_place is not None:
            order = torch.arange(len(by.row_of_place))
            by = replace(by, row_of_place=order, place_of_row=order)
        return f(by, *rest)

    return broken


def _constant_a(f: Callable[..., Any]) -> Callable[..., Any]:
    def broken(by: Any, weights: Any, *rest: Any) -> Any:
        if weights is not None:
            weights = replace(
                weights, gate_up_a=weights.gate_up_a if weights.gate_up_a is None else weights.gate_up_a.detach()
            )
        return f(by, weights, *rest)

    return broken


def _none_is_the_first(f: Callable[..., Any]) -> Callable[..., Any]:
    def broken(config: Any, d: Any) -> Any:
        return f(config, d if d.adapter_of_row is None else replace(d, adapter_of_row=d.adapter_of_row.clamp(min=0)))

    return broken


def _all_have_the_first(f: Callable[..., Any]) -> Callable[..., Any]:
    def broken(config: Any, d: Any) -> Any:
        return f(config, d if d.adapter_of_row is None else replace(d, adapter_of_row=d.adapter_of_row.clamp(max=0)))

    return broken


def _first_adapter(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda where, config, weights, adapters, adapter, sign: f(where, config, weights, adapters, 0, sign)


def _only_in_kept_groups(f: Callable[..., Any]) -> Callable[..., Any]:
    def broken(config: Any, z: Any, ids: Any) -> Any:
        groups = config.router.groups
        if groups is None or groups.limit == "each":
            return f(config, z, ids)
        kept = _scores._kept_experts(groups, z.detach())
        return torch.where(kept.gather(-1, ids.clamp(min=0)), f(config, z, ids), 0)

    return broken


BUGS = (
    # route
    PlantedBug("routing_equals_the_reference", "weights swapped in a row", route.route, after(_swap_first_and_last)),
    PlantedBug(
        "routing_equals_the_reference",
        "the scaling factor is dropped",
        route.route,
        with_router(routed_scaling_factor=1.0, scale_on="weights"),
    ),
    PlantedBug(
        "ids_of_a_token_are_distinct_and_in_range",
        "the first choice is not masked for the second",
        _scores._sparsemixer_choice,
        before(lambda router, z, candidates: (router, z, z)),
    ),
    PlantedBug(
        "ids_of_a_token_are_distinct_and_in_range",
        "ids are too large by one",
        _scores._best,
        after(lambda ids, *a: ids + 1),
    ),
    PlantedBug("weights_are_finite_and_float32", "NaN scores are kept", _scores.finite, instead(lambda s: s)),
    PlantedBug(
        "weights_are_finite_and_float32",
        "the denominator is not guarded against 0",
        _routing_weights._norm,
        instead(lambda router, w: w.sum(-1, keepdim=True)),
    ),
    PlantedBug(
        "ties_go_to_the_lowest_expert_id",
        "ties go to the highest id",
        _scores._best,
        instead(
            lambda v, k: (
                v.shape[-1] - 1 - v.flip(-1).sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, k)
            )
        ),
    ),
    PlantedBug(
        "renormalized_rows_sum_to_the_scale",
        "the sum of the weights is too large by 1e-3",
        _routing_weights._norm,
        after(_sum_too_large),
    ),
    PlantedBug(
        "renormalized_rows_sum_to_the_scale",
        "weights are scaled before renormalization",
        route._route,
        with_router(routed_scaling_factor=1.0, scale_on="weights"),
    ),
    PlantedBug(
        "adding_a_constant_to_a_softmax_row_changes_nothing",
        "logits are scaled by the largest of the row",
        _scores.transformed_logits,
        after(lambda z, *a: z * (1 + z.abs().amax(-1, keepdim=True))),
    ),
    PlantedBug(
        "permuting_experts_permutes_ids",
        "1 is added to the score of expert 0",
        _scores._candidates,
        after(lambda v, *a: v + torch.nn.functional.one_hot(torch.tensor(0), v.shape[-1])),
    ),
    PlantedBug(
        "groups_never_chosen_contribute_nothing",
        "groups are not masked",
        _scores._kept_experts,
        after(lambda kept, *a: torch.ones_like(kept)),
    ),
    PlantedBug(
        "groups_never_chosen_contribute_nothing",
        "the worst groups are kept",
        _scores._kept_experts,
        before(lambda groups, v: (groups, -v)),
    ),
    PlantedBug(
        "the_correction_bias_changes_the_choice_but_not_the_weights",
        "a bias is added to the scores of the weights too",
        _scores.finite,
        instead(lambda s: s.nan_to_num() + 0.1 * torch.rand_like(s)),
    ),
    PlantedBug(
        "the_correction_bias_changes_the_choice_but_not_the_weights",
        "the bias is ignored",
        _scores._with_bias,
        instead(lambda router, extra, kind, v: v),
    ),
    PlantedBug(
        "padding_tokens_have_no_expert",
        "weights of padding are cleared, but not its ids",
        _routing_weights.without_padding,
        instead(lambda r, mask: replace(r, weights=torch.where(mask.unsqueeze(-1), r.weights, 0))),
    ),
    PlantedBug(
        "hash_routing_ignores_how_large_the_logits_are",
        "ids are the top k of the logits",
        route.route,
        with_router(selection="top_k"),
    ),
    PlantedBug(
        "a_capacity_keeps_the_first_slots_of_every_expert",
        "an expert keeps one slot too many",
        route.within_capacity,
        before(lambda config, routing, capacity, leading: (config, routing, capacity + 1, leading)),
    ),
    PlantedBug(
        "a_capacity_keeps_the_first_slots_of_every_expert",
        "the capacity counts over all sequences",
        route.within_capacity,
        before(lambda config, routing, capacity, leading: (config, routing, capacity, None)),
    ),
    PlantedBug(
        "norms_around_the_layer_equal_the_reference",
        "the scale of the norm is dropped",
        arithmetic.rms_norm,
        before(lambda config, x, scale, eps: (config, x, None, eps)),
    ),
    PlantedBug(
        "joining_undoes_sharding",
        "gate and up are sliced as one matrix",
        cutting.slice_of,
        before(lambda t, dim, parts, *r: (t, dim, 1, *r)),
    ),
    PlantedBug(
        "a_norm_for_the_gate_equals_a_gate_on_normed_inputs",
        "the input of the gate is not normed",
        transform.norm_for_gate,
        instead(lambda config, x: x),
    ),
    PlantedBug(
        "routing_and_then_the_routed_layer_give_the_layer",
        "routing weights are doubled",
        forward.moe_route,
        after(lambda out, *a: (out[0], replace(out[1], weights=2 * out[1].weights))),
    ),
    PlantedBug(
        "routing_to_its_own_choice_gives_the_routing",
        "weights are in reverse order",
        _scores.weights_of_choice,
        after(lambda w, *a: w.flip(-1)),
    ),
    PlantedBug(
        "routing_to_its_own_choice_gives_the_routing",
        "weights of a given choice have no gradient",
        _scores.weights_of_choice,
        after(lambda w, *a: w.detach()),
    ),
    PlantedBug(
        "routing_to_any_choice_equals_the_reference",
        "slots without expert get the weight of expert 0",
        _scores.weights_of_choice,
        before(lambda router, z, ids: (router, z, ids.clamp(min=0))),
    ),
    PlantedBug(
        "routing_to_any_choice_equals_the_reference",
        "weights of experts outside of the chosen groups are 0",
        _scores.weights_of_choice,
        _only_in_kept_groups,
    ),
    # dispatch
    PlantedBug(
        "slot_of_row_is_a_permutation_of_the_slots",
        "row_of_slot is slot_of_row instead of its inverse",
        dispatch._dispatch,
        after(lambda d, *a: replace(d, row_of_slot=d.slot_of_row)),
    ),
    PlantedBug("the_expert_of_a_row_never_decreases", "rows are not sorted", dispatch._dispatch, after(_unsorted)),
    PlantedBug("rows_of_one_expert_keep_token_order", "the sort is not stable", dispatch._dispatch, after(_unstable)),
    PlantedBug(
        "expert_ends_is_the_running_count_of_rows_per_expert",
        "expert_ends are too small by one",
        dispatch._dispatch,
        after(_ends_off_by_one),
    ),
    PlantedBug(
        "expert_ends_is_the_running_count_of_rows_per_expert",
        "slots of id -1 are counted for expert 0",
        dispatch._dispatch,
        _negative_is_expert_zero,
    ),
    PlantedBug("slots_of_no_expert_come_last", "slots of id -1 come first", dispatch._dispatch, after(_padding_first)),
    # experts
    PlantedBug(
        "a_row_depends_on_its_own_expert_alone",
        "rows are multiplied by the previous expert's weights",
        grouped._groups,
        after(lambda gs, *a: ((max(i - 1, 0), s, e) for i, s, e in gs)),
    ),
    PlantedBug(
        "rows_of_no_expert_are_never_read",
        "the last expert's rows include those of no expert",
        grouped._groups,
        after(
            lambda gs, ends, total, *a: (
                (i, s, total if n == ends.numel() - 1 else e) for n, (i, s, e) in enumerate(gs)
            )
        ),
    ),
    PlantedBug(
        "both_weight_layouts_give_the_same_numbers",
        "the up half is not used",
        experts.activate,
        instead(lambda a, h, *_: h[..., : h.shape[-1] // 2] if a.gated else torch.rand_like(h)),
    ),
    PlantedBug(
        "packed_and_interleaved_weights_give_the_same_numbers",
        "interleaved weights are read as packed",
        experts.activate,
        before(lambda a, h, layout="packed", *rest: (a, h, "packed", *rest)),
    ),
    PlantedBug(
        "zero_biases_change_nothing",
        "1 is added to every bias",
        grouped_matmul.spread_over_rows,
        after(lambda s, *a: s + 1),
    ),
    # combine
    PlantedBug(
        "combine_is_linear_in_the_routing_weights",
        "weights are renormalized in combine too",
        combine._combine,
        before(
            lambda c, r, d, routing: (
                c,
                r,
                d,
                replace(routing, weights=routing.weights / routing.weights.sum(-1, keepdim=True)),
            )
        ),
    ),
    PlantedBug(
        "slots_of_no_expert_contribute_nothing_even_nan",
        "rows of no expert are multiplied by 0 instead of masked",
        combine._combine,
        instead(
            lambda c, r, d, routing: (
                r[d.row_of_slot].view(-1, c.top_k, r.shape[-1])
                * (routing.weights * (routing.expert_ids >= 0)).unsqueeze(-1)
            ).sum(1)
        ),
    ),
    PlantedBug(
        "combine_undoes_dispatch",
        "the permutation is used in the place of its inverse",
        combine._combine,
        before(
            lambda c, r, d, routing: (c, r, replace(d, row_of_slot=d.slot_of_row, slot_of_row=d.row_of_slot), routing)
        ),
    ),
    # around the experts
    PlantedBug(
        "shared_experts_see_the_original_input",
        "shared experts get the latent input",
        compose.routed_and_shared,
        before(lambda c, w, x, *rest: (c, w, x * w.latent.input.sum() if w.latent else x, *rest)),
    ),
    PlantedBug(
        "several_shared_experts_are_the_sum_of_single_ones",
        "shared experts are averaged",
        shared.shared_experts,
        after(lambda y, config, *a: None if y is None else y / config.shared.intermediate_size),
    ),
    PlantedBug(
        "padding_the_hidden_dimension_changes_nothing",
        "the hidden dimension is padded with ones",
        compose.transform_input,
        after(
            lambda v, config, *a: torch.cat(
                [v[..., : config.routed_size], torch.ones_like(v[..., config.routed_size :])], -1
            )
        ),
    ),
    PlantedBug(
        "an_identity_latent_space_changes_nothing",
        "the output is always normalized",
        transform.transform_output,
        after(lambda y, config, *a: y * 1.1 if config.latent else y),
    ),
    PlantedBug(
        "a_scale_on_the_output_equals_a_scale_on_the_weights",
        "the scale is applied twice",
        join.addends,
        after(
            lambda parts, config, *a: (
                parts[0] * config.router.routed_scaling_factor if config.router.scale_on != "weights" else parts[0],
                parts[1],
            )
        ),
    ),
    PlantedBug(
        "the_float16_rule_divides_the_whole_layer_by_the_scale",
        "the shared part is multiplied instead of divided",
        join.addends,
        after(
            lambda parts, config, *a: (
                parts[0],
                parts[1] * 6.25
                if parts[1] is not None and config.router.scale_on == "output_float16_safe"
                else parts[1],
            )
        ),
    ),
    PlantedBug(
        "an_average_is_half_of_a_sum",
        "only the shared part is halved",
        join.addends,
        after(
            lambda parts, config, routed, *a: (
                (parts[0] * 2, parts[1]) if config.shared and config.shared.combine == "average" else parts
            )
        ),
    ),
    PlantedBug(
        "without_a_group_only_padding_columns_are_cut",
        "one column too many is cut",
        reduce_and_trunc.reduce_and_trunc,
        instead(lambda y, group=None, width=None: y[..., : (width or y.shape[-1]) - 1]),
    ),
    PlantedBug(
        "identity_experts_add_their_weight_times_the_input",
        "identity experts are added without their weight",
        zero_experts.zero_experts,
        before(lambda c, w, x, r, y: (c, w, x, replace(r, weights=torch.ones_like(r.weights)), y)),
    ),
    PlantedBug(
        "zero_experts_cost_nothing_and_add_nothing",
        "tokens of zero experts go to the last real expert",
        dispatch._dispatch,
        before(lambda c, x, r: (c, x, replace(r, expert_ids=r.expert_ids.clamp(max=c.num_experts - 1)))),
    ),
    PlantedBug(
        "constant_experts_add_their_weight_times_their_vector",
        "constants are doubled",
        zero_experts.zero_experts,
        before(
            lambda c, w, x, r, y: (c, replace(w, constants=None if w.constants is None else w.constants * 2), x, r, y)
        ),
    ),
    # the layer
    PlantedBug(
        "the_layer_equals_the_reference",
        "gate and up are exchanged",
        experts.activate,
        before(lambda a, h, *rest: (a, h.flip(-1), *rest)),
    ),
    PlantedBug(
        "the_layer_equals_the_reference",
        "the scaling factor is doubled",
        route._route,
        after(lambda r, config, *a: replace(r, weights=r.weights * config.router.routed_scaling_factor)),
    ),
    PlantedBug(
        "gradients_equal_the_reference",
        "the native gradient to the routing weights is doubled",
        routed_experts.native_backward_op,
        after(lambda found, *a: (found[0], found[1] * 2, *found[2:])),
    ),
    PlantedBug(
        "the_fused_kernel_equals_the_stages",
        "the op multiplies by the routing weights twice",
        routed_experts.by_native_op,
        before(lambda c, w, x, r: (c, w, x, replace(r, weights=r.weights * r.weights))),
    ),
    PlantedBug(
        "prepared_weights_give_the_same_numbers",
        "panels are in reverse order",
        prepare.down_to_panels,
        after(lambda panels, *a: panels.flip(3)),
    ),
    PlantedBug(
        "restoring_undoes_preparing",
        "columns of restored weights are in reverse order",
        panels.weight_from_panels,
        after(lambda t, *a: t.flip(1)),
    ),
    PlantedBug(
        "converting_prepared_weights_is_preparing_converted_ones",
        "panels keep the column order of the previous dtype",
        panels.convert_panels,
        instead(lambda panels, dtype, inputs: panels.to(dtype)),
    ),
    PlantedBug(
        "preparing_twice_is_preparing_once",
        "prepared weights are not recognized",
        prepare.is_prepared,
        instead(lambda w: False),
    ),
    PlantedBug(
        "gradients_equal_the_reference",
        "the routing of the layer has no gradient",
        compose._route,
        after(lambda r, *a: replace(r, weights=r.weights.detach())),
    ),
    PlantedBug(
        "the_layer_commutes_with_permuting_tokens",
        "outputs depend on the token's position",
        combine._combine,
        after(_depends_on_the_position),
    ),
    PlantedBug(
        "relabelling_experts_changes_nothing",
        "rows of expert 0 are scaled by 1.01",
        experts._experts,
        after(_depends_on_the_label),
    ),
    PlantedBug(
        "concatenated_batches_give_concatenated_outputs",
        "a mean over the batch is added",
        combine._combine,
        after(_depends_on_the_batch),
    ),
    PlantedBug(
        "the_layer_is_linear_in_the_routing_weights",
        "weights are clamped to 0..1",
        combine._combine,
        before(lambda c, r, d, routing: (c, r, d, replace(routing, weights=routing.weights.clamp(0, 1)))),
    ),
    PlantedBug(
        "any_routing_equals_the_reference",
        "an expert that is chosen twice counts once",
        combine._combine,
        before(
            lambda c, r, d, routing: (
                c,
                r,
                d,
                replace(
                    routing,
                    weights=torch.where(routing.expert_ids == routing.expert_ids.roll(1, -1), 0, routing.weights)
                    if c.top_k > 1
                    else routing.weights,
                ),
            )
        ),
    ),
    PlantedBug(
        "choosing_all_experts_gives_the_dense_mixture",
        "the last choice has weight 0",
        routed_experts.routed_experts,
        before(
            lambda c, w, x, r: (c, w, x, replace(r, weights=torch.cat([r.weights[:, :-1], r.weights[:, -1:] * 0], 1)))
        ),
    ),
    PlantedBug(
        "garbage_in_padding_never_reaches_the_output",
        "padding is multiplied by 0 instead of masked",
        compose.without_padding,
        instead(_zero_padding_by_product),
    ),
    PlantedBug(
        "chunked_equals_unchunked", "the last, partial chunk is zeros", chunked._scan, instead(_drops_the_last_chunk)
    ),
    PlantedBug(
        "opaque_equals_transparent",
        "the op ignores the token mask",
        opaque._chunk,
        before(
            lambda config, shared_, args: (
                config,
                shared_,
                [*args[:3], None if args[3] is None else torch.ones_like(args[3]), *args[4:]],
            )
        ),
    ),
    PlantedBug(
        "opaque_equals_transparent",
        "the op halves its gradients",
        opaque._gradients,
        after(lambda gs, *a: tuple(None if g is None else g / 2 for g in gs)),
    ),
    PlantedBug(
        "flattening_leading_dimensions_changes_nothing",
        "leading dimensions are restored in another order",
        call.restore_shape,
        after(lambda y, call, *a: y if y.ndim < 3 else y.flip(0, 1, 2)),
    ),
    PlantedBug(
        "autocast_does_not_round_a_float32_gate",
        "the gate's input is rounded to the autocast dtype",
        call.check_and_flatten,
        after(lambda c, *a: replace(c, gate_x=c.x)),
    ),
    PlantedBug(
        "autocast_equals_weights_in_its_dtype",
        "the router's weights are rounded too",
        call._in_autocast,
        after(lambda w, *a: w if w.router is None else replace(w, router=_rounded_floats(w.router))),
    ),
    PlantedBug("inputs_are_never_written_to", "x is changed in place", transform.transform_input, _writes_into_x),
    PlantedBug(
        "a_batch_invariant_token_has_the_same_bits_in_any_batch",
        "logits are rounded in units of the largest of the batch",
        _scores.transformed_logits,
        after(
            lambda z, *a: (z / (1 + z.abs().amax())).bfloat16().to(z.dtype) * (1 + z.abs().amax()) if z.numel() else z
        ),
    ),
    PlantedBug(
        "a_batch_invariant_gradient_has_the_same_bits_in_any_batch",
        "gradients are scaled by the largest of the batch, and back",
        opaque._gradients,
        after(
            lambda gs, *a: tuple(
                g if g is None or not g.numel() else g * (1 / g.abs().amax()) * g.abs().amax() for g in gs
            )
        ),
    ),
    PlantedBug(
        "the_same_inputs_give_the_same_bits",
        "random numbers are added to the output",
        combine._combine,
        after(_random_bits),
    ),
    PlantedBug(
        "shared_and_routed_add_up_to_the_layer",
        "the shared part is doubled",
        compose.parts_of_tokens,
        after(lambda parts, *a: (parts[0] * 2, parts[1])),
    ),
    PlantedBug(
        "stats_do_not_change_the_output",
        "the output with stats is another one",
        forward.moe_forward_with_stats,
        after(lambda out, *a: (out[0] * 1.01, out[1])),
    ),
    PlantedBug(
        "ids_of_any_integer_dtype_are_the_same_ids",
        "ids keep their narrow dtype",
        checks.checked_integers,
        instead(lambda where, name, value: value),
    ),
    PlantedBug(
        "expert_load_counts_the_slots",
        "expert_load counts id -1 for expert 0",
        balance.expert_load,
        before(lambda ids, n: (ids.clamp(min=0), n)),
    ),
    PlantedBug(
        "losses_equal_the_reference",
        "the mean is over slots instead of tokens",
        balance.load_balancing_loss,
        after(lambda loss, scores, ids, *a: loss / ids.shape[-1]),
    ),
    PlantedBug(
        "the_bias_of_overloaded_experts_falls_and_of_idle_ones_rises",
        "the bias is updated with the wrong sign",
        balance.update_correction_bias,
        before(lambda b, load, rate: (b, load, -rate)),
    ),
    # adapters
    PlantedBug(
        "lora_equals_the_reference",
        "every row is multiplied by A and B of the first expert",
        _adapters._product,
        before(lambda by, rows, m: (by, rows, m[:, :1])),
    ),
    PlantedBug(
        "lora_equals_the_reference",
        "rows stay in the order of adapters",
        _adapters.add_adapters,
        _rows_in_order_of_adapters,
    ),
    PlantedBug("gradients_reach_a_and_b", "A has no gradient", _adapters.add_adapters, _constant_a),
    PlantedBug(
        "an_adapter_of_zeros_changes_nothing",
        "ones are added to the product with B A",
        _adapters.add_adapters,
        after(lambda out, by, *a: out if by is None else 1.01 * out),
    ),
    PlantedBug(
        "tokens_without_an_adapter_get_the_layer_without_lora",
        "adapter id -1 is taken for adapter 0",
        _adapters.sort_by_adapter,
        _none_is_the_first,
    ),
    PlantedBug(
        "relabelling_adapters_changes_nothing",
        "all tokens have adapter 0",
        _adapters.sort_by_adapter,
        _all_have_the_first,
    ),
    PlantedBug(
        "merged_equals_applied",
        "adapter 0 is merged instead of the one asked for",
        lora._with_product_added,
        _first_adapter,
    ),
    PlantedBug(
        "unmerging_undoes_merging",
        "unmerging adds the product instead of subtracting it",
        lora._with_product_added,
        before(lambda *a: (*a[:-1], 1.0)),
    ),
    PlantedBug(
        "a_padded_rank_changes_nothing",
        "the rank is padded with ones",
        lora.padded_to,
        after(lambda t, *a: torch.where(t == 0, 1.0, t)),
    ),
)

# Bugs of integrations, which need packages that the layer does not.
if importlib.util.find_spec("transformers") is not None:
    from moe_fn.integrations.transformers import blocks, swapped
    from moe_fn.integrations.transformers import reading as below_block

    def _alone(child: tuple[str, below_block.Kind]) -> tuple[str, below_block.Kind]:
        return child[0], replace(child[1], children=())

    BUGS += (
        PlantedBug(
            "a_block_of_transformers_equals_its_config_and_weights",
            "gates and ups of a block are exchanged",
            blocks.weights_of_block,
            after(lambda weights, *a: replace(weights, gate_up=weights.gate_up.flip(1))),
        ),
        PlantedBug(
            "a_replaced_model_computes_the_same",
            "the correction bias is left out",
            swapped._unpack,
            after(
                lambda out, *a: (out[0], replace(out[1], expert_ids=out[0].topk(out[1].expert_ids.shape[-1]).indices))
            ),
        ),
        PlantedBug(
            "hooks_and_adapters_below_a_replaced_block_take_effect_or_are_refused_by_name",
            "hooks of a module and a forward of its own are ignored",
            below_block.why_called_itself,
            lambda why: lambda module, cls, *rest: None if type(module) is cls else why(module, cls, *rest),
        ),
        PlantedBug(
            "hooks_and_adapters_below_a_replaced_block_take_effect_or_are_refused_by_name",
            "submodules are not checked",
            below_block.why_called,
            before(
                lambda module, kind, *rest: (module, replace(kind, children=tuple(map(_alone, kind.children))), *rest)
            ),
        ),
    )

if importlib.util.find_spec("safetensors") is not None:
    from moe_fn.checkpoint import axes, peft_config, peft_versions, read_plan, saving, slices
    from moe_fn.checkpoint import peft as loading_lora

    def _on_the_first_slice(config: Any) -> Any:
        tp = config.parallel and config.parallel.tp
        return config if tp is None else replace(config, parallel=replace(config.parallel, tp=replace(tp, rank=0)))

    BUGS += (
        PlantedBug(
            "an_adapter_of_peft_is_loaded_as_it_was_saved",
            "patterns are ignored",
            peft_config._first_match,
            instead(lambda pattern, module, default: default),
        ),
        PlantedBug(
            "an_adapter_of_peft_is_loaded_as_it_was_saved",
            "every adapter is read as of a new version of peft",
            peft_versions.is_of_outputs,
            instead(lambda *a: False),
        ),
        PlantedBug(
            "an_adapter_of_peft_is_loaded_as_it_was_saved",
            "gates and ups of an adapter are exchanged",
            loading_lora._gate_and_up,
            before(lambda gate, up: (up, gate)),
        ),
        PlantedBug(
            "saving_undoes_loading",
            "every expert is saved under the first one's name",
            saving._tensor,
            before(lambda entry, expert, *rest: (entry, None if expert is None else 0, *rest)),
        ),
        PlantedBug(
            "saving_undoes_loading",
            "ups are read from the gates' tensor",
            read_plan._copy_piece,
            before(
                lambda piece, *rest: (
                    replace(piece, part=replace(piece.part, entry=replace(piece.part.entry, pins=()))),
                    *rest,
                )
            ),
        ),
        PlantedBug(
            "slices_of_ranks_make_up_the_whole",
            "a cut through gates and ups is one rectangle",
            axes.rectangles,
            instead(
                lambda pattern, sizes, ranges: iter(
                    [{axis: ranges.get(axis, (0, sizes[axis])) for axis in axes.axes_of(pattern)}]
                )
            ),
        ),
        PlantedBug(
            "slices_of_ranks_make_up_the_whole",
            "every rank has the first experts",
            slices.slices_of,
            after(lambda found, *a: replace(found, experts=tuple(range(len(found.experts))))),
        ),
        PlantedBug(
            "loading_with_config_parallel_equals_sharding_the_whole",
            "every slice adds the biases of down",
            slices.is_added_here,
            instead(lambda *a: True),
        ),
        PlantedBug(
            "loading_with_config_parallel_equals_sharding_the_whole",
            "every rank has the adapters of the first slice",
            lora._of_rank,
            before(lambda config, *rest: (_on_the_first_slice(config), *rest)),
        ),
        PlantedBug(
            "loading_with_config_parallel_equals_sharding_the_whole",
            "config.parallel is ignored",
            slices.slices_of,
            before(lambda config, wanted: (replace(config, parallel=None), replace(wanted, placement=None))),
        ),
        PlantedBug(
            "loading_with_config_parallel_equals_sharding_the_whole",
            "a placement of copies is ignored",
            slices._experts_of_rank,
            before(
                lambda config, placement: (replace(config, parallel=replace(config.parallel, num_physical=None)), None)
            ),
        ),
    )
