"""from_block: reads a `MoEConfig` and `MoEWeights` from a Mixture-of-Experts block (a module) of transformers."""

import functools
from typing import Any

from torch import nn

from moe_fn.config import MoEConfig
from moe_fn.families import Family, build_config, family_of_block
from moe_fn.families.keys import MISSING, Lookup
from moe_fn.integrations.transformers.reading import (
    Kind,
    kind_of,
    overridden,
    why_called,
    why_not_plain,
    without_wrappers,
)
from moe_fn.integrations.transformers.tensors import Plan, Sizes, plan_of_block, tensor_of
from moe_fn.records import WEIGHT_PATHS, MoEWeights, weights_of_leaves

_PLAIN = (bool, int, float, str, type(None))


def from_block(block: nn.Module) -> tuple[MoEConfig, MoEWeights]:
    """The config and the weights with which moe_forward computes the output of a block.

        moe_forward(*from_block(block), x) == block(x)      float32: relative error <= 1e-5, the same experts

    block is an instance of a class that `moe_fn.families` lists. For Gemma-4 it is the decoder layer, of which the
    experts branch is computed: from the residual to the norm of the experts' output. Weights are the block's
    parameters, not copies, unless the block stores them in another form: separate gates and ups (shared experts, dbrx),
    separate experts (Switch), norms stored as weight - 1 (Muse-Spark). Hash layers need token_ids. Zaya's router is a
    network with a state: pass the logits of its gate to moe_forward. Operations of training only (jitter of the input,
    Phi's sampling) are not part of the config.

    Raises ValueError for an unknown block, for one that is not a token-choice mixture of feed-forward experts, with the
    reason, and if the block does not compute what its parameters determine, with the module's name: an adapter, a hook,
    another forward, an unknown class, a quantized or sharded parameter. Parametrizations are computed and stay on the
    module.

    Laws
        A block of transformers equals its config and weights.

    Source: the modeling files of transformers 5.20 to 5.23.

    >>> import torch
    >>> from transformers import Qwen3MoeConfig
    >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    >>> hf_config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2,
    ...     norm_topk_prob=True)
    >>> config, weights = from_block(Qwen3MoeSparseMoeBlock(hf_config))
    >>> config.num_experts, config.top_k, weights.gate_up.shape
    (4, 2, torch.Size([4, 8, 8]))
    """
    family = family_of_module(block)
    if family.refused:
        raise ValueError(f"from_block: {type(block).__name__} is not supported: {family.refused}")
    plan = plan_of_block(family, block)
    why = why_not_known(block) or why_no_floats(block, plan) or why_called(block, kind_of_block(family, block, plan))
    why = why or why_not_plain(block)
    if why is not None:
        wanted = (
            "expected modules that compute what their parameters determine: merge adapters and remove hooks first, or "
            "call the block"
        )
        raise ValueError(f"from_block: {type(block).__name__}: {why}; {wanted}")
    config = config_of_block(family, block, plan)
    return config, weights_of_block(config, block, plan)


def family_of_module(module: nn.Module) -> Family:
    """The family of a module, by its class or a base class."""
    known = known_class(module)
    return family_of_block(type(module).__name__ if known is None else known.__name__)


def known_class(module: nn.Module) -> type | None:
    """The first class in the module's MRO that is in the table of families; None without one."""
    return next((cls for cls in type(module).__mro__ if is_known(cls)), None)


def why_not_known(block: nn.Module) -> str | None:
    """The reason why a block differs from the known class that it derives from: methods it overrides; None without
    one.
    """
    known = known_class(block)
    own = [] if known is None else overridden(type(block), known)
    return None if known is None or not own else f"it overrides {', '.join(own)} of {known.__name__}"


def why_no_floats(block: nn.Module, plan: Plan) -> str | None:
    """The reason why the experts' weights cannot be read: modules of quantized experts have other names; None if they
    can.
    """
    missing = [path for path in ("gate_up", "down") if path not in dict(plan)]
    experts = type(without_wrappers(getattr(block, "experts", block))).__name__
    return f"{experts} has no tensor for {' or '.join(missing)}; expected experts of floats" if missing else None


def kind_of_block(
    family: Family, block: nn.Module, plan: Plan, leave: tuple[str, ...] = (), alone: tuple[str, ...] = ()
) -> Kind:
    """The classes of the modules whose parameters are read instead of calling them, at this time.

    leave: names of modules that are called and not checked. alone: names of modules that are checked without their
    children, because they are called and only some of their outputs are used.
    """
    read = {name.split(".")[0] for _, source in plan for name in source.names}
    others = tuple(name for name in block._modules if name not in read) if family.live.is_layer else ()
    return kind_of(block, known_class(block) or type(block), (*leave, *others), alone)


def is_known(cls: type) -> bool:
    """Whether a class is a block in the table of families, including refused ones."""
    try:
        family_of_block(cls.__name__)
    except ValueError:
        return False
    return True


def config_of_block(family: Family, block: nn.Module, plan: Plan) -> MoEConfig:
    """The config of a block: options from its attributes and its model's config, sizes from its tensors."""
    shapes = _shapes(block, plan)
    shared = next(
        (m for name in ("shared_experts", "shared_expert", "shared_mlp") if (m := _module(block, name)) is not None),
        None,
    )
    width = shapes["shared.down"][1] if "shared.down" in shapes else 0
    lookup = lookup_in(block)
    in_out = family.layer.get("weight_layout") == "in_out"
    experts, *inner = shapes["down"]
    hidden, intermediate = reversed(inner) if in_out else inner
    width_of_model = shapes["latent.input"][1] if "latent.input" in shapes else hidden
    sizes = {"num_experts": experts, "intermediate_size": intermediate, "hidden_size": width_of_model}
    shared_lookup = lookup_in(block, first=shared)
    return build_config(family, lookup, sizes=sizes, shared_width=width, shared_lookup=shared_lookup)


def weights_of_block(config: MoEConfig, block: nn.Module, plan: Plan) -> MoEWeights:
    """The weights from the block's current tensors; differentiable, and traceable by torch.compile."""
    sizes = Sizes(config.num_experts, config.num_logits)
    found = {path: tensor_of(block, source, sizes) for path, source in plan if _wanted(config, path)}
    return weights_of_leaves([found.get(".".join(path)) for path in WEIGHT_PATHS])


def _wanted(config: MoEConfig, path: str) -> bool:
    """Whether the config uses a tensor of the block; some blocks have tensors that they ignore."""
    needs = {
        "router.correction_bias": config.router.correction_bias != "none",
        "router.expert_ids_of_token": config.router.selection == "hash",
        "shared.gate": config.shared is not None and config.shared.gate == "sigmoid",
    }
    return needs.get(path, not path.startswith("shared.") or config.shared is not None)


def _shapes(block: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors from which sizes are read; the number of experts is that of down."""
    sources = dict(plan)
    one = Sizes(num_experts=_num_experts(block), num_logits=1)
    wanted = ("down", "shared.down", "latent.input")
    return {path: tuple(tensor_of(block, sources[path], one).shape) for path in wanted if path in sources}


def _num_experts(block: nn.Module) -> int:
    experts: Any = without_wrappers(getattr(block, "experts", block))
    return int(getattr(experts, "num_experts", 1))


def lookup_in(block: nn.Module, first: nn.Module | None = None) -> Lookup:
    """A lookup in a block: names with a leading dot are attributes of its modules, others are keys of the configs that
    its modules hold.
    """
    names = ("gate", "router", "experts", "experts.mlp", "experts.expert_0")
    inside = (_module(block, name) for name in names)
    places = [m for m in (first, block, *inside) if m is not None]
    configs = list({id(c): c for m in block.modules() if (c := getattr(m, "config", None)) is not None}.values())
    layer = next((m.layer_idx for m in places if isinstance(getattr(m, "layer_idx", None), int)), None)

    def lookup(name: str) -> Any:
        owners = places if name.startswith(".") else configs
        found = (_plain(getattr(owner, name.lstrip("."), MISSING), layer) for owner in owners)
        return next((value for value in found if value is not MISSING), MISSING)

    return lookup


def _module(block: nn.Module, path: str) -> nn.Module | None:
    value: Any = block
    for name in path.split("."):
        value = without_wrappers(getattr(value, name, None))
    return value if isinstance(value, nn.Module) else None


def _plain(value: Any, layer: Any) -> Any:
    """The value of an option: numbers and strings, the layer's element of a list, and the name of an activation module
    or of its class; MISSING for other types.
    """
    if isinstance(value, list | tuple):
        value = value[layer] if layer is not None and layer < len(value) else MISSING
    # An activation without a known name differs from the config's: its class's name is refused with an error.
    if isinstance(value, nn.Module):
        return _name_of_activation(value)
    return value if isinstance(value, _PLAIN) else MISSING


def _name_of_activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return _names_of_activations().get(type(module), type(module).__name__)


@functools.cache
def _names_of_activations() -> dict[type, str]:
    from transformers.activations import ACT2FN

    names = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "relu2")
    return {nn.SiLU: "silu", nn.ReLU: "relu"} | {type(ACT2FN[name]): name for name in names}
