"""Which shape each weight of a layer has, by its config."""

from moe_fn.config import MoEConfig, as_activation
from moe_fn.quant.shapes import shapes_of_quant
from moe_fn.records import Path, Shape
from moe_fn.stages._adapters import shapes_of_adapters
from moe_fn.weights.prepare import plain_shapes

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
