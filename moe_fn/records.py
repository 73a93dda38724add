"""The values that travel between stages: weights, routing, dispatched rows, statistics.

Axes, and the words other code bases use for them:

    tokens T         positions of the input (M, length)
    hidden H         model width (D, K)                     expert_hidden Hx  width the experts see (latent, padded)
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


@dataclass(frozen=True, kw_only=True)
class RouterWeights:
    """gate [logits, H or Hx] and bias [logits]; the rest changes which experts are chosen, or how much they count."""

    gate: Tensor | None = None
    bias: Tensor | None = None
    correction_bias: Tensor | None = None  # [choices]: added for the choice only (e_score_correction_bias)
    # [logits]: multiplies the weight of each expert (Gemma-4), shared ones too (Inkling)
    expert_scale: Tensor | None = None
    expert_ids_of_token: Tensor | None = None  # [vocabulary, top_k] ints: hash routing (tid2eid)
    # Copies of experts (ParallelConfig.num_physical), int64, as in moe_fn.balance.Placement:
    logical_of_physical: Tensor | None = None  # [P]: the expert in each slot
    physical_of_logical: Tensor | None = None  # [E, max replicas]: slots of each expert, padded with -1
    num_replicas: Tensor | None = None  # [E]


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """gate_up [gate_up S, H] (all gates, then all ups) and down [H, S]; S = count * intermediate_size."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None  # [gate_up S]
    down_bias: Tensor | None = None  # [H]
    gate: Tensor | None = None  # [1, H]: the sigmoid gate


@dataclass(frozen=True, kw_only=True)
class LatentWeights:
    """input [L, H] and output [H, L], with optional biases [L], [H] and norm scales [L]."""

    input: Tensor
    output: Tensor
    input_bias: Tensor | None = None
    output_bias: Tensor | None = None
    input_norm: Tensor | None = None
    output_norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LoRAWeights:
    """Adapters of the experts, L of them, alpha / rank folded into B. Both matrices of a product or none; 1 for E where
    experts share.

    Rows of gate_up_b are in the order of gate_up's outputs, interleaved too; weight_layout means nothing here.
    """

    gate_up_a: Tensor | None = None  # [L, E or 1, rank, Hx]
    gate_up_b: Tensor | None = None  # [L, E or 1, gate_up, rank]
    down_a: Tensor | None = None  # [L, E or 1, rank, I]
    down_b: Tensor | None = None  # [L, E or 1, Hx, rank]


@dataclass(frozen=True, kw_only=True)
class QuantWeights:
    """What turns the codes q in gate_up and down into numbers, where MoEConfig.quant says that they are codes:

        W[e, n, k] = (q[e, n, k] - zero_point[e, i, j]) * scale[e, i, j] * global_scale[e, half of n, 0]

    (i, j) the tile that (n, k) lies in. A scale covers a tile (outputs, inputs), `QuantConfig.tile`; gate and up of a
    packed gate_up are tiled apart. Scales [E, halves * ceil(outputs of a half / outputs of a tile), ceil(inputs /
    inputs of a tile)]: floats, uint8 exponents (e8m0: 2^(S - 127); mxfp4, mxfp8) or float8_e4m3fn (nvfp4). Codes: fp8
    and mxfp8 float8_e4m3fn; int8 int8, or uint8 with zero points; int4 two in a byte, the even input in the low half,
    0..15, zero 8 without zero points; mxfp4 and nvfp4 likewise, e2m1, sign on top.
    """

    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_zero_point: Tensor | None = None  # uint8, like the scale
    down_zero_point: Tensor | None = None
    gate_up_global_scale: Tensor | None = None  # [E, halves, 1] float: nvfp4
    down_global_scale: Tensor | None = None  # [E, 1, 1]
    gate_up_input_scale: Tensor | None = None  # [E] float: static activations, of the inputs of gate_up
    down_input_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """All tensors of a layer; a pytree, so it is an argument of compile, export, func.grad and tree_map.

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
    output_norm: Tensor | None = None  # [H]: scale of the norm after everything
    router: RouterWeights | None = None
    shared: SharedWeights | None = None
    latent: LatentWeights | None = None
    lora: LoRAWeights | None = None
    quant: QuantWeights | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Who goes where.

    An id of -1 is "no expert"; ids from num_experts on are zero experts; none of them costs a product.
    """

    expert_ids: Tensor  # [T, top_k] integers, best first
    weights: Tensor  # [T, top_k] float32 (float64 for float64 logits)
    shared_weights: Tensor | None = None  # [T, shared experts]: where the router weighs them
    # [T] integers, -1 for none: the LoRA adapter of each token; None: adapter 0, the only one
    adapter_ids: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Copies of tokens, sorted by expert. Rows from expert_ends[-1] on belong to no expert."""

    rows: Tensor  # [R, Hx]
    expert_ends: Tensor  # [E] int32
    slot_of_row: Tensor  # [R] int64
    row_of_slot: Tensor  # [R] int64
    adapter_of_row: Tensor | None = None  # [R]: Routing.adapter_ids of the row's token


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """What the router did, as values; nothing is recorded on the side. Losses carry gradients to the logits."""

    expert_ids: Tensor  # [T, top_k]
    # [choices] int64: slots per expert, of this rank's tokens; of all ranks': moe_fn.balance.load_over_ranks
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

Path = tuple[str, ...]  # of a tensor in MoEWeights: ("router", "gate")
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


# What each field of MoEWeights is made of; None: a tensor itself.
_PARTS = {name: _names(NESTED_WEIGHTS[name]) if name in NESTED_WEIGHTS else None for name in _names(MoEWeights)}

# Every tensor that MoEWeights can hold, in the order that ops take them: ("gate_up",), ..., ("router", "gate"), ...
WEIGHT_PATHS: tuple[Path, ...] = tuple(
    path
    for name, parts in _PARTS.items()
    for path in ([(name,)] if parts is None else [(name, part) for part in parts])
)


def leaves_of_weights(weights: MoEWeights) -> list[Tensor | None]:
    """The tensors in the order of WEIGHT_PATHS, None where there is none."""
    leaves: list[Tensor | None] = []
    for name, parts in _PARTS.items():
        value = getattr(weights, name)
        if parts is None:
            leaves.append(value)
        elif value is None:  # most layers lack most of them, and every call of the layer comes here
            leaves += [None] * len(parts)
        else:
            leaves += [getattr(value, part) for part in parts]
    return leaves


def weights_of_leaves(leaves: list[Tensor | None]) -> MoEWeights:
    """The inverse of leaves_of_weights; a nested record all of whose tensors are None is None."""
    values: dict[str, Tensor | None] = {}
    nested: dict[str, dict[str, Tensor]] = {}
    for path, leaf in zip(WEIGHT_PATHS, leaves, strict=True):
        if len(path) == 1:
            values[path[0]] = leaf
        elif leaf is not None:
            nested.setdefault(path[0], {})[path[1]] = leaf
    return MoEWeights(**values, **{name: NESTED_WEIGHTS[name](**parts) for name, parts in nested.items()})  # type: ignore[arg-type]
