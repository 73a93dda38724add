"""Dataclasses of tensors that stages pass to each other: weights, routing, dispatched rows, statistics.

Axes, with the names that other code bases use in parentheses:

    tokens T         positions of the input (M, length)
    hidden H         model width (D, K)                     expert_hidden Hx  input width of experts (latent, padded)
    intermediate I   expert width (N, F)                    gate_up           2 I if the activation is gated, else I
    experts E        experts with weights                   choices           E + zero experts
    top_k            choices per token (K)                  rows R            T * top_k
    slot             flat (token, choice) = token * top_k + choice          row   place after sorting by expert

Index maps are called b_of_a: slot_of_row[row] is a slot. expert_ends[e] is where expert e's rows end:
e owns rows[expert_ends[e - 1] : expert_ends[e]]  (offsets in torch.grouped_mm, bins in megablocks).
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.torch_compat import constant_while_tracing


@dataclass(frozen=True, kw_only=True)
class RouterWeights:
    """Router gate [logits, H or Hx] and bias [logits]; the rest changes the choice of experts, or their weights."""

    gate: Tensor | None = None
    bias: Tensor | None = None
    correction_bias: Tensor | None = None  # [choices]: added for the choice only (e_score_correction_bias)
    # [logits]: multiplies the routing weight of each expert (Gemma-4), shared experts too (Inkling)
    expert_scale: Tensor | None = None
    expert_ids_of_token: Tensor | None = None  # [vocabulary, top_k] ints: hash routing (tid2eid)
    # Copies of experts (ParallelConfig.num_physical), int64, as in moe_fn.balance.Placement:
    logical_of_physical: Tensor | None = None  # [P]: the expert in each slot
    physical_of_logical: Tensor | None = None  # [E, max replicas]: slots of each expert, padded with -1
    num_replicas: Tensor | None = None  # [E]


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """Shared experts: gate_up [gate_up S, H] (all gates, then all ups), down [H, S]; S = count * intermediate_size."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None  # [gate_up S]
    down_bias: Tensor | None = None  # [H]
    gate: Tensor | None = None  # [1, H]: the sigmoid gate


@dataclass(frozen=True, kw_only=True)
class LatentWeights:
    """Latent projections input [L, H] and output [H, L], with optional biases [L], [H] and norm scales [L]."""

    input: Tensor
    output: Tensor
    input_bias: Tensor | None = None
    output_bias: Tensor | None = None
    input_norm: Tensor | None = None
    output_norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LoRAWeights:
    """L LoRA adapters of the experts, with alpha / rank folded into B. A product has both A and B, or neither; the
    expert dim is 1 where experts share a matrix.

    Rows of gate_up_b have the order of gate_up's outputs, packed or interleaved; weight_layout does not apply.
    """

    gate_up_a: Tensor | None = None  # [L, E or 1, rank, Hx]
    gate_up_b: Tensor | None = None  # [L, E or 1, gate_up, rank]
    down_a: Tensor | None = None  # [L, E or 1, rank, I]
    down_b: Tensor | None = None  # [L, E or 1, Hx, rank]


@dataclass(frozen=True, kw_only=True)
class QuantWeights:
    """Scales and zero points of quantized gate_up and down, which hold codes q with MoEConfig.quant:

        W[e, n, k] = (q[e, n, k] - zero_point[e, i, j]) * scale[e, i, j] * global_scale[e, half of n, 0]

    (i, j) is the tile of (n, k). A scale covers a tile (outputs, inputs), `QuantConfig.tile`; the gate half and the up
    half of a packed gate_up are tiled separately.

    scales  [E, halves * ceil(outputs of a half / outputs of a tile), ceil(inputs / inputs of a tile)]: floats, uint8
            exponents (e8m0: 2^(S - 127); mxfp4, mxfp8) or float8_e4m3fn (nvfp4)
    codes   fp8, mxfp8: float8_e4m3fn; int8: int8, or uint8 with zero points; int4: two in a byte, the even input in the
            low half, 0..15, zero is 8 without zero points; mxfp4, nvfp4: likewise, e2m1 with the sign in the top bit
    """

    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_zero_point: Tensor | None = None  # uint8, like the scale
    down_zero_point: Tensor | None = None
    gate_up_global_scale: Tensor | None = None  # [E, halves, 1] float: nvfp4
    down_global_scale: Tensor | None = None  # [E, 1, 1]
    gate_up_input_scale: Tensor | None = None  # [E] float: static scales of the inputs of gate_up
    down_input_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """All weights of a layer; a pytree, so compile, export, func.grad and tree_map take it as an argument.

    gate_up [E, gate_up, Hx] and down [E, Hx, I]; with weight_layout="in_out" [E, Hx, gate_up] and [E, I, Hx]; codes
    with MoEConfig.quant.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None  # [E, gate_up]
    down_bias: Tensor | None = None  # [E, Hx]
    expert_norm: Tensor | None = None  # [E, Hx]
    constants: Tensor | None = None  # [zero experts, H]
    input_norm: Tensor | None = None  # [H]: scale of the norm before the routed experts
    output_norm: Tensor | None = None  # [H]: scale of the norm of the layer's output
    router: RouterWeights | None = None
    shared: SharedWeights | None = None
    latent: LatentWeights | None = None
    lora: LoRAWeights | None = None
    quant: QuantWeights | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Expert ids and routing weights of each token.

    An id of -1 means no expert; ids >= num_experts are zero experts. Neither costs a matrix product.
    """

    expert_ids: Tensor  # [T, top_k] integers, best first
    weights: Tensor  # [T, top_k] float32 (float64 for float64 logits)
    shared_weights: Tensor | None = None  # [T, shared experts]: with SharedExpertsConfig(gate="router")
    # [T] integers, -1 for none: the LoRA adapter of each token; None: adapter 0, the only one
    adapter_ids: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Rows: one copy of its token for each slot, sorted by expert. Rows from expert_ends[-1] on have no expert."""

    rows: Tensor  # [R, Hx]
    expert_ends: Tensor  # [E] int32
    slot_of_row: Tensor  # [R] int64
    row_of_slot: Tensor  # [R] int64
    adapter_of_row: Tensor | None = None  # [R]: Routing.adapter_ids of the row's token


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """Load per expert, dropped slots and losses of one routing. Losses are differentiable in the logits."""

    expert_ids: Tensor  # [T, top_k]
    # [choices] int64: slots per expert from this rank's tokens; moe_fn.balance.load_over_ranks sums over ranks
    expert_load: Tensor
    dropped_slots: Tensor  # [] int64: slots of no expert (id -1) of tokens that are not padding
    router_z_loss: Tensor  # [] float32
    load_balancing_loss: Tensor  # [] float32: Switch / Mixtral form over all tokens
    sequence_balancing_loss: Tensor  # [] float32: DeepSeek form, mean over sequences


RECORDS = (
    RouterWeights,
    SharedWeights,
    LatentWeights,
    LoRAWeights,
    QuantWeights,
    MoEWeights,
    Routing,
    Dispatched,
    RoutingStats,
)
for _cls in RECORDS:
    torch.export.register_dataclass(_cls, serialized_type_name=f"moe_fn.{_cls.__name__}")

Path = tuple[str, ...]  # path of a tensor in MoEWeights: ("router", "gate")
Shape = tuple[tuple[str, int], ...]  # name and size of each dim of a weight
NESTED_WEIGHTS = {
    "router": RouterWeights,
    "shared": SharedWeights,
    "latent": LatentWeights,
    "lora": LoRAWeights,
    "quant": QuantWeights,
}


def _names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(record))


# Field names of each nested record of MoEWeights; None: the field is a tensor.
_PARTS = {name: _names(NESTED_WEIGHTS[name]) if name in NESTED_WEIGHTS else None for name in _names(MoEWeights)}


@constant_while_tracing
def _parts() -> tuple[tuple[str, tuple[str, ...] | None], ...]:
    return tuple(_PARTS.items())


# Paths of all tensors of MoEWeights, in the order of the ops' arguments: ("gate_up",), ..., ("router", "gate"), ...
WEIGHT_PATHS: tuple[Path, ...] = tuple(
    path
    for name, parts in _PARTS.items()
    for path in ([(name,)] if parts is None else [(name, part) for part in parts])
)


def leaves_of_weights(weights: MoEWeights) -> list[Tensor | None]:
    """Returns the tensors in the order of WEIGHT_PATHS, None for absent ones."""
    leaves: list[Tensor | None] = []
    for name, parts in _parts():
        value = getattr(weights, name)
        if parts is None:
            leaves.append(value)
        elif value is None:  # fast path: every call of the layer flattens, and most layers lack most records
            leaves += [None] * len(parts)
        else:
            leaves += [getattr(value, part) for part in parts]
    return leaves


def weights_of_leaves(leaves: list[Tensor | None]) -> MoEWeights:
    """The inverse of leaves_of_weights; a nested record becomes None if all its tensors are None."""
    values: dict[str, Tensor | None] = {}
    nested: dict[str, dict[str, Tensor]] = {}
    for path, leaf in zip(WEIGHT_PATHS, leaves, strict=True):
        if len(path) == 1:
            values[path[0]] = leaf
        elif leaf is not None:
            nested.setdefault(path[0], {})[path[1]] = leaf
    return MoEWeights(**values, **{name: NESTED_WEIGHTS[name](**parts) for name, parts in nested.items()})  # type: ignore[arg-type]
