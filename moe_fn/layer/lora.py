"""LoRA adapters of the experts: make them, add them to a layer, merge one into the weights and subtract it again."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fn.checks import check_float, check_int, check_kind
from moe_fn.config import LoRAConfig, MoEConfig
from moe_fn.config.local import experts_of_rank
from moe_fn.config.lora import LoRAExperts
from moe_fn.numerics import accumulation_dtype
from moe_fn.parallel.adapters import shard_adapters
from moe_fn.parallel.expert_ranks import placement_of_weights
from moe_fn.records import LoRAWeights, MoEWeights
from moe_fn.weights.check import check_layer, check_shapes
from moe_fn.weights.prepare import restore_weights
from moe_fn.weights.spec import plain_sizes

NAMES = tuple(field.name for field in dataclasses.fields(LoRAWeights))
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Pair = tuple[Tensor, Tensor]  # A [E or 1, rank, in], B [E or 1, out, rank]


def make_lora(
    *, gate_up: Pair | None = None, down: Pair | None = None, alpha: float, rank_stabilised: bool = False
) -> LoRAWeights:
    """Returns one adapter from the matrices (A, B) of each product, with alpha / rank (or alpha / sqrt(rank)) folded
    into B.

    A [E or 1, rank, in] and B [E or 1, out, rank]; each product has its own rank. Outputs of gate_up's B are gates,
    then ups (or interleaved).

    >>> lora = make_lora(down=(torch.ones(4, 2, 6), torch.ones(4, 8, 2)), alpha=6.0)
    >>> lora.down_b.shape, lora.down_b[0, 0, 0].tolist()
    (torch.Size([1, 4, 8, 2]), [3.0, 3.0])
    """
    check_float("make_lora: alpha", alpha)
    tensors: dict[str, Tensor] = {}
    for name, pair in (("gate_up", gate_up), ("down", down)):
        if pair is None:
            continue
        a, b = pair
        if a.ndim != 3 or b.ndim != 3 or a.shape[1] != b.shape[2] or a.shape[1] == 0:
            raise ValueError(
                f"make_lora: {name} is {list(a.shape)} and {list(b.shape)}; expected [E or 1, rank, in] and [E or 1, "
                "out, rank]"
            )
        factor = scaling_of(alpha, a.shape[1], rank_stabilised)
        tensors |= {
            f"{name}_a": a.unsqueeze(0),
            f"{name}_b": (b.to(accumulation_dtype(b.dtype)) * factor).to(b.dtype).unsqueeze(0),
        }
    if not tensors:
        raise ValueError("make_lora: gate_up and down are None; expected the matrices of at least one")
    return LoRAWeights(**tensors)


def scaling_of(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """Returns the LoRA factor alpha / rank; rank_stabilised: alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def add_lora(config: MoEConfig, weights: MoEWeights, adapters: Sequence[LoRAWeights]) -> tuple[MoEConfig, MoEWeights]:
    """Returns the layer with these adapters, numbered from 0. Ranks are padded with zeros to the largest.

    A product that only some adapters have is zeros for the others. If experts share a matrix in some adapters but not
    in others, every expert gets its own. Adapters need the dtype of x when the layer is called. With config.parallel
    the weights are this rank's part, and the adapters those of the whole layer: this rank's part is cut from them, as
    in shard_weights.

    Raises ValueError for a layer that has adapters, and for shapes that do not fit.

    Laws
        A padded rank changes nothing.

    >>> config = MoEConfig(num_experts=4, top_k=1, hidden_size=8, intermediate_size=6)
    >>> weights = MoEWeights(gate_up=torch.zeros(4, 12, 8), down=torch.zeros(4, 8, 6))
    >>> small, large = (make_lora(down=(torch.ones(4, r, 6), torch.ones(4, 8, r)), alpha=1.0) for r in (2, 3))
    >>> config, weights = add_lora(config, weights, [small, large])
    >>> config.lora, weights.lora.down_a.shape
    (LoRAConfig(num_adapters=2, rank=3, experts='each'), torch.Size([2, 4, 3, 6]))
    """
    check_layer("add_lora", config, weights)
    if config.lora is not None or weights.lora is not None:
        raise ValueError("add_lora: the layer has adapters; expected none: pass all adapters in one call")
    if (
        not isinstance(adapters, Sequence)
        or not adapters
        or not all(isinstance(lora, LoRAWeights) and _tensors(lora) for lora in adapters)
    ):
        raise ValueError(
            "add_lora: adapters is empty, not a sequence, or has an element without tensors; "
            "expected a sequence of LoRAWeights"
        )
    completed = [_with_both_products(lora, adapters) for lora in adapters]
    ranks = [t.shape[2 if name.endswith("a") else 3] for lora in completed for name, t in _tensors(lora).items()]
    sizes = {name: max(_tensors(lora)[name].shape[1] for lora in completed) for name in _tensors(completed[0])}
    kind = _kind(sizes, config.num_experts)
    lora_config = LoRAConfig(num_adapters=sum(_count(lora) for lora in completed), rank=max(ranks), experts=kind)

    def padded(name: str, t: Tensor) -> Tensor:
        t = padded_to(t, lora_config.rank, 2 if name.endswith("a") else 3)
        return t.expand(-1, 1 if lora_config.shares(name) else config.num_experts, -1, -1) if t.shape[1] == 1 else t

    tensors = {
        name: torch.cat([padded(name, _tensors(lora)[name]) for lora in completed]) for name in _tensors(completed[0])
    }
    config = dataclasses.replace(config, lora=lora_config)
    weights = dataclasses.replace(weights, lora=_of_rank(config, weights, LoRAWeights(**tensors)))
    check_shapes("add_lora", config, weights)
    return config, weights


def _of_rank(config: MoEConfig, weights: MoEWeights, lora: LoRAWeights) -> LoRAWeights | None:
    """Checks adapters of the whole layer and returns this rank's part."""
    parallel, lora_config = config.parallel, config.lora
    if parallel is None or lora_config is None:
        return lora
    whole_layer = dataclasses.replace(config, parallel=None, quant=None)
    gate_up, down = (torch.empty(plain_sizes(whole_layer, (name,)), device="meta") for name in ("gate_up", "down"))
    check_shapes(
        "add_lora, adapters of the whole layer", whole_layer, MoEWeights(gate_up=gate_up, down=down, lora=lora)
    )
    if parallel.num_physical is not None:
        experts = placement_of_weights(weights).logical_of_physical
        tensors = _tensors(lora).items()
        copied = {
            name: t if lora_config.shares(name) else t.index_select(1, experts.to(t.device)) for name, t in tensors
        }
        lora = LoRAWeights(**copied)
    return shard_adapters(
        config, lora, torch.tensor(experts_of_rank(config, parallel), device=next(iter(_tensors(lora).values())).device)
    )


def merge_lora(config: MoEConfig, weights: MoEWeights, adapter: int = 0) -> tuple[MoEConfig, MoEWeights]:
    """Returns the layer without adapters and with weights W + B A of one adapter, added in float32 and rounded once.

    It equals the layer for tokens with that adapter, without LoRA's cost; the other adapters are dropped. It is
    differentiable. With config.parallel it merges this rank's part. Prepared weights are restored: prepare the result
    again.

    Raises ValueError for a layer without adapters, for an adapter number out of range, and for quantized weights, whose
    codes cannot represent the sum: dequantize them first.

    Laws
        Merged equals applied.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1)
    >>> weights = MoEWeights(gate_up=torch.zeros(1, 2, 1), down=torch.ones(1, 1, 1))
    >>> config, weights = add_lora(config, weights,
    ...     [make_lora(down=(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)), alpha=1.0)])
    >>> config, merged = merge_lora(config, weights)
    >>> merged.down.item(), merged.lora, config.lora
    (7.0, None, None)
    """
    check_layer("merge_lora", config, weights)
    if config.lora is None or weights.lora is None:
        raise ValueError("merge_lora: the layer has no adapters; expected config.lora and weights.lora")
    merged = _with_product_added("merge_lora", config, weights, weights.lora, adapter, 1.0)
    return dataclasses.replace(config, lora=None), dataclasses.replace(merged, lora=None)


def unmerge_lora(
    config: MoEConfig, weights: MoEWeights, lora: LoRAWeights, adapter: int = 0
) -> tuple[MoEConfig, MoEWeights]:
    """The inverse of merge_lora up to rounding: returns the layer with the adapters `lora` and with weights W - B A of
    the one that was merged.

    To get the original bits, keep the original weights. Raises the errors of merge_lora and add_lora.

    Laws
        Unmerging undoes merging.
    """
    check_kind("unmerge_lora", "lora", lora, LoRAWeights)
    config, weights = add_lora(config, weights, [lora])
    return config, _with_product_added("unmerge_lora", config, weights, weights.lora or lora, adapter, -1.0)


def _with_product_added(
    where: str, config: MoEConfig, weights: MoEWeights, lora: LoRAWeights, adapter: int, sign: float
) -> MoEWeights:
    check_int(f"{where}: adapter", adapter, 0, _count(lora) - 1)
    for name in ("gate_up", "down"):
        if getattr(weights, name).dtype not in _FLOATS:
            raise ValueError(
                f"{where}: weights.{name} is {getattr(weights, name).dtype}, quantized; expected float weights: "
                "dequantize them first"
            )
    weights = restore_weights(config, weights)
    check_shapes(where, config, weights)

    def total(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        if a is None or b is None:
            return weight
        wide = accumulation_dtype(weight.dtype)
        product = b[adapter].to(wide) @ a[adapter].to(wide)
        product = product if config.weight_layout == "out_in" else product.transpose(1, 2)
        return (weight.to(wide) + sign * product).to(weight.dtype)

    gate_up, down = (
        total(weights.gate_up, lora.gate_up_a, lora.gate_up_b),
        total(weights.down, lora.down_a, lora.down_b),
    )
    return dataclasses.replace(weights, gate_up=gate_up, down=down)


def padded_to(t: Tensor, size: int, dim: int) -> Tensor:
    """Returns t padded with zeros at the end of a dim, up to a size."""
    shape = list(t.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)


def _tensors(lora: LoRAWeights) -> dict[str, Tensor]:
    return {name: t for name in NAMES if (t := getattr(lora, name)) is not None}


def _count(lora: LoRAWeights) -> int:
    return next(iter(_tensors(lora).values())).shape[0]


def _with_both_products(lora: LoRAWeights, others: Sequence[LoRAWeights]) -> LoRAWeights:
    """Returns the adapter with zeros of rank 1 for matrices that only other adapters have."""
    own, zeros = _tensors(lora), dict[str, Tensor]()
    for other in others:
        for name, t in _tensors(other).items():
            if name not in own and name not in zeros:
                zeros[name] = t.new_zeros(
                    _count(lora), 1, *((1, t.shape[3]) if name.endswith("a") else (t.shape[2], 1))
                )
    return dataclasses.replace(lora, **zeros)


def _kind(experts: dict[str, int], num_experts: int) -> LoRAExperts:
    """Returns LoRAConfig.experts, from the largest expert dim of each tensor."""
    kinds: tuple[LoRAExperts, ...] = ("shared", "outer_shared") if num_experts > 1 else ()
    for kind in kinds:
        if all(size == 1 for name, size in experts.items() if LoRAConfig(experts=kind).shares(name)):
            return kind
    return "each"
