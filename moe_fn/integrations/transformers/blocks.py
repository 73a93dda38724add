"""from_block: a live Mixture-of-Experts block of transformers as a config and weights of ours."""

import functools
from typing import Any

from torch import nn

from moe_fn.config import MoEConfig
from moe_fn.families import Family, build_config, family_of_block
from moe_fn.families.words import MISSING, Look
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
# families whose block is a whole decoder layer: of its modules those count that hold a tensor of ours
_LAYERS = ("gemma4_text",)


def from_block(block: nn.Module) -> tuple[MoEConfig, MoEWeights]:
    """The config and the weights of a block, such that moe_forward(config, weights, x) is what the block adds to the
    model.

        moe_forward(*from_block(block), x) == block(x)      float32: relative error <= 1e-5, the same experts

    block: any of the classes that `moe_fn.families` lists (for Gemma-4 the decoder layer, whose experts branch is
    meant: from the residual to the norm of what the experts return). Weights are the block's own parameters, not
    copies, except where the block keeps them in another form: gates and ups apart (shared experts, dbrx), experts apart
    (Switch), norms around zero (Muse-Spark). Hash layers want token_ids. Zaya's router is a network with a state: hand
    moe_forward the logits that its gate returns. What a block does in training only (jitter of its input, Phi's
    sampling) is not part of the config.

    Raises ValueError for a block that is not known, for one that is no token-choice mixture of feed-forward experts,
    saying why, and where the block computes something else than its parameters say, naming the module: an adapter, a
    hook, a forward of its own, a class that is not known, a parameter that is quantized or a shard. Parametrizations
    are computed, and then are what they were.

    Laws
        A block of transformers equals its config and weights.

    Source: the modeling files of transformers 5.20 to 5.23.

    >>> import torch
    >>> from transformers import Qwen3MoeConfig
    >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    >>> words = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2,
    ...     norm_topk_prob=True)
    >>> config, weights = from_block(Qwen3MoeSparseMoeBlock(words))
    >>> config.num_experts, config.top_k, weights.gate_up.shape
    (4, 2, torch.Size([4, 8, 8]))
    """
    family = family_of_module(block)
    if family.refused:
        raise ValueError(f"from_block: {type(block).__name__} is not for moe_fn: {family.refused}")
    plan = plan_of_block(family.names[0], block)
    why = why_not_known(block) or why_no_floats(block, plan) or why_called(block, kind_of_block(family, block, plan))
    why = why or why_not_plain(block)
    if why is not None:
        wanted = (
            "expected modules that compute what their parameters say: merge adapters and remove hooks first, or call "
            "the block"
        )
        raise ValueError(f"from_block: {type(block).__name__}: {why}; {wanted}")
    config = config_of_block(family, block, plan)
    return config, weights_of_block(config, block, plan)


def family_of_module(module: nn.Module) -> Family:
    """The family's row, by the class of a module or a class that it derives from."""
    known = known_class(module)
    return family_of_block(type(module).__name__ if known is None else known.__name__)


def known_class(module: nn.Module) -> type | None:
    """The module's class, or the first that it derives from, which is in the table."""
    return next((cls for cls in type(module).__mro__ if is_known(cls)), None)


def why_not_known(block: nn.Module) -> str | None:
    """Why a block is not what the table says of the class that it derives from; None for one that is."""
    known = known_class(block)
    own = [] if known is None else overridden(type(block), known)
    return None if known is None or not own else f"it has {', '.join(own)} of its own, beside {known.__name__}"


def why_no_floats(block: nn.Module, plan: Plan) -> str | None:
    """Why the experts have no weights for us; None if they have: modules of quantized experts have other names."""
    missing = [path for path in ("gate_up", "down") if path not in dict(plan)]
    experts = type(without_wrappers(getattr(block, "experts", block))).__name__
    return f"{experts} has no tensor that is {' or '.join(missing)}; expected experts of floats" if missing else None


def kind_of_block(
    family: Family, block: nn.Module, plan: Plan, leave: tuple[str, ...] = (), alone: tuple[str, ...] = ()
) -> Kind:
    """The modules whose parameters are read in place of calling them, as they are now.

    leave: names of modules that are called. alone: names of modules that are called, but whose outputs are not all
    used: they themselves count, what is below them does not.
    """
    read = {name.split(".")[0] for _, source in plan for name in source.names}
    others = tuple(name for name in block._modules if name not in read) if family.names[0] in _LAYERS else ()
    return kind_of(block, known_class(block) or type(block), (*leave, *others), alone)


def is_known(cls: type) -> bool:
    """Whether a class is one of the blocks in the table, refused ones too."""
    try:
        family_of_block(cls.__name__)
    except ValueError:
        return False
    return True


def config_of_block(family: Family, block: nn.Module, plan: Plan) -> MoEConfig:
    """The config: options from the block's attributes and its model's config, sizes from its tensors."""
    shapes = _shapes(block, plan)
    shared = next(
        (m for name in ("shared_experts", "shared_expert", "shared_mlp") if (m := _module(block, name)) is not None),
        None,
    )
    width = shapes["shared.down"][1] if "shared.down" in shapes else 0
    look = look_in(block)
    in_out = family.layer.get("weight_layout") == "in_out"
    experts, *inner = shapes["down"]
    hidden, intermediate = reversed(inner) if in_out else inner
    width_of_model = shapes["latent.input"][1] if "latent.input" in shapes else hidden
    sizes = {"num_experts": experts, "intermediate_size": intermediate, "hidden_size": width_of_model}
    return build_config(family, look, sizes=sizes, shared_width=width, shared_look=look_in(block, first=shared))


def weights_of_block(config: MoEConfig, block: nn.Module, plan: Plan) -> MoEWeights:
    """The weights, of the tensors that the block has now; differentiable, and traced by torch.compile."""
    sizes = Sizes(config.num_experts, config.num_logits)
    found = {path: tensor_of(block, source, sizes) for path, source in plan if _wanted(config, path)}
    return weights_of_leaves([found.get(".".join(path)) for path in WEIGHT_PATHS])


def _wanted(config: MoEConfig, path: str) -> bool:
    """Whether the config reads a tensor that the block has: one may be there and be ignored."""
    needs = {
        "router.correction_bias": config.router.correction_bias != "none",
        "router.expert_ids_of_token": config.router.selection == "hash",
        "shared.gate": config.shared is not None and config.shared.gate == "sigmoid",
    }
    return needs.get(path, not path.startswith("shared.") or config.shared is not None)


def _shapes(block: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that sizes are read from; the number of experts is that of down."""
    sources = dict(plan)
    one = Sizes(num_experts=_num_experts(block), num_logits=1)
    wanted = ("down", "shared.down", "latent.input")
    return {path: tuple(tensor_of(block, sources[path], one).shape) for path in wanted if path in sources}


def _num_experts(block: nn.Module) -> int:
    experts: Any = without_wrappers(getattr(block, "experts", block))
    return int(getattr(experts, "num_experts", 1))


def look_in(block: nn.Module, first: nn.Module | None = None) -> Look:
    """Words of a block: with a dot in front attributes of its modules, otherwise options of the configs that its
    modules hold.
    """
    names = ("gate", "router", "experts", "experts.mlp", "experts.expert_0")
    inside = (_module(block, name) for name in names)
    places = [m for m in (first, block, *inside) if m is not None]
    configs = list({id(c): c for m in block.modules() if (c := getattr(m, "config", None)) is not None}.values())
    layer = next((m.layer_idx for m in places if isinstance(getattr(m, "layer_idx", None), int)), None)

    def look(name: str) -> Any:
        owners = places if name.startswith(".") else configs
        found = (_plain(getattr(owner, name.lstrip("."), MISSING), layer) for owner in owners)
        return next((value for value in found if value is not MISSING), MISSING)

    return look


def _module(block: nn.Module, path: str) -> nn.Module | None:
    value: Any = block
    for name in path.split("."):
        value = without_wrappers(getattr(value, name, None))
    return value if isinstance(value, nn.Module) else None


def _plain(value: Any, layer: Any) -> Any:
    """Numbers and words, the layer's own of a list, and the name of an activation, or its class's; anything else is no
    option.
    """
    if isinstance(value, list | tuple):
        value = value[layer] if layer is not None and layer < len(value) else MISSING
    # one that has no name is not what the config says: then the class's name is refused in words
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
