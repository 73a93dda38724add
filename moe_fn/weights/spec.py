"""The shapes of all weights of a layer by its config: plain, prepared, quantised, of adapters."""

import torch
from torch import Tensor

from moe_fn.config import LoRAConfig, MoEConfig, as_activation
from moe_fn.quant.shapes import shapes_of_quant
from moe_fn.records import Path, Shape
from moe_fn.weights.panels import PANEL, num_panels, per_step_of

Dim = tuple[str, int]  # name and size


ANY = -1  # a size that the config does not say


def expected_shapes(config: MoEConfig) -> dict[Path, tuple[Shape, bool]]:
    """Shape of every weight that fits the config, and whether it must be there; a weight not in the result must not be."""
    own = config.own  # with parallel, the rank's part
    experts, hidden = ("num_experts", own.num_experts), ("hidden_size", config.hidden_size)
    wide = ("expert_hidden_size", config.expert_hidden_size)
    gate_up, down = plain_shapes(own)
    outputs = 1 if config.weight_layout == "out_in" else 2
    choices, logits = ("num_choices", config.num_choices), ("num_logits", config.num_logits)
    gate_width = hidden if config.router.gate_input == "original" else wide
    shapes: dict[Path, tuple[Shape, bool]] = {
        ("gate_up",): (gate_up, True),
        ("down",): (down, True),
        ("gate_up_bias",): ((experts, gate_up[outputs]), False),
        ("down_bias",): ((experts, down[outputs]), False),
        ("router", "gate"): ((logits, gate_width), False),
        ("router", "bias"): ((logits,), False),
        ("router", "expert_scale"): ((logits,), False),
    }
    if config.expert_norm is not None:
        shapes[("expert_norm",)] = ((experts, wide), True)
    if own.quant is not None:
        shapes |= {path: (shape, True) for path, shape in shapes_of_quant(own, gate_up, down).items()}
    if config.norms is not None:
        for name in ("input", "output"):
            if getattr(config.norms, name):
                shapes[(f"{name}_norm",)] = ((hidden,), True)
    if config.zero_experts is not None and config.zero_experts.kind == "constant":
        shapes[("constants",)] = ((("zero_experts.count", config.zero_experts.count), hidden), True)
    if config.router.correction_bias != "none":
        shapes[("router", "correction_bias")] = ((choices,), True)
    if config.router.selection == "hash":
        shapes[("router", "expert_ids_of_token")] = ((("vocabulary", ANY), ("top_k", config.top_k)), True)
    if config.parallel is not None and config.parallel.num_physical is not None:
        logical = ("num_experts", config.num_experts)
        shapes[("router", "logical_of_physical")] = ((("num_physical", config.parallel.num_physical),), True)
        shapes[("router", "physical_of_logical")] = ((logical, ("max replicas", ANY)), True)
        shapes[("router", "num_replicas")] = ((logical,), True)
    if config.shared is not None:
        width = config.shared.count * config.shared.intermediate_size // (config.parallel.slices_of_shared[0] if config.parallel else 1)
        both = 2 * width if as_activation(config.shared.activation).gated else width
        shapes[("shared", "gate_up")] = ((("shared gate_up", both), hidden), True)
        shapes[("shared", "down")] = ((hidden, ("shared width", width)), True)
        shapes[("shared", "gate_up_bias")] = ((("shared gate_up", both),), False)
        shapes[("shared", "down_bias")] = ((hidden,), False)
        if config.shared.gate == "sigmoid":
            shapes[("shared", "gate")] = ((("1", 1), hidden), True)
    if config.lora is not None:
        inner = ("intermediate_size", own.intermediate_size)
        shapes |= {path: (shape, False) for path, shape in shapes_of_adapters(config.lora, experts, wide, gate_up[outputs], inner).items()}
    if config.latent is not None:
        latent = ("latent.size", config.latent.size)
        shapes[("latent", "input")] = ((latent, hidden), True)
        shapes[("latent", "output")] = ((hidden, latent), True)
        for name, dim in (("input_bias", latent), ("output_bias", hidden), ("input_norm", latent), ("output_norm", latent)):
            shapes[("latent", name)] = ((dim,), False)
    left_out = added_by_others(config)
    return {path: shape for path, shape in shapes.items() if path not in left_out}


def added_by_others(config: MoEConfig) -> tuple[Path, ...]:
    """Biases that the rank with the first slice has, and no other: the slices' outputs are summed, and a bias is to be in it once."""
    parallel = config.parallel
    if parallel is None:
        return ()
    later = {("down_bias",): parallel.slices[1], ("shared", "down_bias"): parallel.slices_of_shared[1]}
    return tuple(path for path, number in later.items() if number > 0)


BESIDE = ("scale", "zero_point")  # of codes: what is laid with them


def is_prepared(weight: Tensor) -> bool:
    """Whether a gate_up or down is one that prepare_weights has laid."""
    return weight.ndim == 4


def plain_shapes(config: MoEConfig) -> tuple[Shape, Shape]:
    """Shapes of plain gate_up and down."""
    experts, hidden = ("num_experts", config.num_experts), ("expert_hidden_size", config.expert_hidden_size)
    inner = ("intermediate_size", config.intermediate_size)
    gate_up = ("2 * intermediate_size", 2 * config.intermediate_size) if as_activation(config.activation).gated else inner
    if config.weight_layout == "out_in":
        per_byte = 1 if config.quant is None else config.quant.per_byte
        of_hidden, of_inner = ((name if per_byte == 1 else f"{name} / {per_byte}", size // per_byte) for name, size in (hidden, inner))
        return (experts, gate_up, of_hidden), (experts, hidden, of_inner)
    return (experts, hidden, gate_up), (experts, inner, hidden)


def prepared_shapes(config: MoEConfig, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of prepared gate_up and down; dtype: theirs, or of codes any of one byte."""
    per_byte, per_step = (1, per_step_of(dtype)) if config.quant is None else (config.quant.per_byte, per_step_of(torch.uint8))

    def shape(name: str, inner: int) -> tuple[int, ...]:
        return config.num_experts, num_panels(config, name), -(-inner // (per_byte * per_step)), PANEL * per_step

    return shape("gate_up", config.expert_hidden_size), shape("down", config.intermediate_size)


def prepared_beside_shapes(config: MoEConfig) -> dict[tuple[str, str], Shape]:
    """Shapes of scales and zero points that are laid with codes."""
    names = ("num_experts", "panels", "tiles of inputs", "columns of a panel")
    shapes: dict[tuple[str, str], Shape] = {}
    if config.quant is None:
        return shapes
    for name, inner in (("gate_up", config.expert_hidden_size), ("down", config.intermediate_size)):
        sizes = config.num_experts, num_panels(config, name), -(-inner // (config.quant.tile[1] or inner)), PANEL
        shapes |= {("quant", f"{name}_{what}"): tuple(zip(names, sizes, strict=True)) for what in BESIDE}
    return shapes


def shapes_of_adapters(lora: LoRAConfig, experts: Dim, wide: Dim, gate_up: Dim, inner: Dim) -> dict[tuple[str, ...], tuple[Dim, ...]]:
    """Shape of every tensor of LoRAWeights, for sizes of the experts."""
    adapters, rank = ("num_adapters", lora.num_adapters), ("rank", lora.rank)
    matrices = {"gate_up_a": (rank, wide), "gate_up_b": (gate_up, rank), "down_a": (rank, inner), "down_b": (wide, rank)}
    one = ("1 of all experts", 1)
    return {("lora", name): (adapters, one if lora.shares(name) else experts, *matrix) for name, matrix in matrices.items()}
