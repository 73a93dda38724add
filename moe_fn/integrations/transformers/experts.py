"""moe_fn's experts in transformers' ExpertsInterface; routers, blocks, checkpoints and `generate` remain the
model's.
"""

import functools
import json
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig, as_activation
from moe_fn.config.parts import padding_experts
from moe_fn.forward import moe_forward_routed
from moe_fn.integrations.transformers.gates import activation_of, places_of_numbers
from moe_fn.integrations.transformers.reading import calls_known_modules_only, is_plain
from moe_fn.layer.call import autocast_dtype
from moe_fn.ops.grouped_matmul import GROUPED, spread_over_rows
from moe_fn.ops.rows import has_expert
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages._checks import check_routing, check_x
from moe_fn.stages.combine import combine
from moe_fn.stages.dispatch import dispatch
from moe_fn.torch_compat import constant_while_tracing

# Options of MoEConfig that experts honor if the model's own code calls their module.
RUNNING = ("chunk_tokens", "recompute", "opaque", "backend")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def register(name: str = "moe_fn") -> None:
    """Registers `name` as an experts implementation of transformers, for every model that uses its ExpertsInterface.

        y[t] = sum over j of  weights[t, j] * norm(down[e] @ gate(up[e] @ x[t] + b) + c),   e = ids[t, j]

    `model.set_experts_implementation(name)` and `from_pretrained(..., experts_implementation=name)` select it. It
    supports everything that an experts module may define: layouts, biases, no gate, its own gate or norm, ids of other
    ranks (num_experts and above, or below 0: they add nothing, for any weight), any integer and float dtypes, top_k
    above num_experts, no tokens. Known gates and activations run in the fused op of the back-end (`moe_fn.backends`);
    others are called between grouped products. The module is not modified.

    Rounding: the products compute in the dtype of the experts' weights (under autocast, in autocast's) and accumulate
    in float32; gates, biases, routing weights and the sum over experts are float32 and rounded once, where transformers
    rounds every step. The module's own gate or norm gets the dtype in which the products compute. The result has the
    dtype of the input; float64 stays float64.

    Raises ValueError if the name is taken. Calls raise ValueError for quantized or distributed weights, and for wrong
    shapes. Registering twice has no effect.

    Source: the interface is transformers.integrations.moe.ExpertsInterface (5.20 and later).

    >>> import transformers
    >>> register()
    >>> config = transformers.MixtralConfig(
    ...     num_hidden_layers=1, hidden_size=16, intermediate_size=8, num_attention_heads=2,
    ...     num_key_value_heads=1, vocab_size=32
    ... )
    >>> model = transformers.MixtralForCausalLM(config).eval()
    >>> ids = torch.tensor([[3, 1, 4]])
    >>> theirs = model(ids).logits
    >>> model.set_experts_implementation("moe_fn")
    >>> torch.testing.assert_close(model(ids).logits, theirs)
    """
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    if not isinstance(name, str) or not name:
        raise ValueError(f"register: name is {name!r}; expected a nonempty str")
    # Modules with float8 weights look names up here: registered, experts_forward raises an error about the weights
    # instead of transformers' "unknown name".
    interfaces = (ExpertsInterface, FP8ExpertsInterface)
    if name == "eager" or any(
        interface().get(name, experts_forward) is not experts_forward for interface in interfaces
    ):
        raise ValueError(
            f"register: {name!r} is an implementation of transformers; expected a name that is not taken, such as "
            "'moe_fn'"
        )
    for interface in interfaces:
        interface.register(name, experts_forward)


def running_of(config: MoEConfig) -> str:
    """The options of a config's experts as JSON, the argument `running` of experts_forward."""
    return json.dumps({name: getattr(config, name) for name in (*RUNNING, "batch_invariant")})


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, running: str = "{}"
) -> Tensor:
    """The forward that transformers calls for each experts module: x [T, H], ids and weights [T, K] to [T, H] in the
    dtype of x.
    """
    part: Any = module
    gate, act = _gate_of(module), _act_of(module)
    weights = _weights_of(module)
    if hidden_states.ndim != 2:
        raise ValueError(f"{_name(module)}: hidden_states has {hidden_states.ndim} dims; expected (tokens, hidden)")
    places = places_of_numbers(part.has_gate, gate, act)
    numbers = () if places is None else tuple(_text(_number(module, place)) for place in places)
    sizes = [_text(n) for n in (weights.gate_up.shape[0], top_k_index.shape[-1], *weights.down.shape[1:])]
    known = places is not None
    key = _key_of_config(
        running,
        known,
        part.has_gate,
        part.is_transposed,
        gate if known else None,
        act if known else None,
        *sizes,
        *numbers,
    )
    config = _CONFIGS[key]
    routing = Routing(expert_ids=top_k_index, weights=top_k_weights)
    x = hidden_states.to(weights.gate_up.dtype)
    if known and not part.has_post_expert_norm:
        return moe_forward_routed(config, weights, x, routing).to(hidden_states.dtype)
    if config.chunk_tokens is not None or config.recompute or config.batch_invariant or config.opaque:
        raise ValueError(
            f"{_name(module)}: experts with their own gate or norm do not support options; expected none of {running}"
        )
    return by_stages_of_module(module, config, weights, x, routing).to(hidden_states.dtype)


def by_stages_of_module(
    module: nn.Module, config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing
) -> Tensor:
    """The experts of a module with its own gate or norm: dispatch, product, gate, product, norm, combine.

    Rows without an expert are 1 in the module's gate and norm, because gradients may not be finite at 0 (norm, sqrt).
    """
    part: Any = module
    check_x(_name(module), config, x)
    routing = check_routing(_name(module), config, x, routing)
    dtype = autocast_dtype(x) or x.dtype
    dispatched = dispatch(config, x.to(dtype), routing)
    rows, ends, transposed = dispatched.rows, dispatched.expert_ends, config.weight_layout == "out_in"
    backend = backend_of(config, rows)
    present = has_expert(rows.shape[0], ends)

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = GROUPED[backend].matmul(rows.to(dtype), weight.to(dtype), ends, transposed)
        return out if bias is None else (out + spread_over_rows(backend, bias, ends, rows.shape[0])).to(dtype)

    rows = torch.where(present, product(rows, weights.gate_up, weights.gate_up_bias), 1)
    rows = part._apply_gate(rows) if part.has_gate else part.act_fn(rows)
    if rows.shape[-1] != config.intermediate_size:
        raise ValueError(
            f"{_name(module)}: its gate returns {rows.shape[-1]} columns; expected {config.intermediate_size}"
        )
    rows = product(rows, weights.down, weights.down_bias)
    if part.has_post_expert_norm:
        rows = part.post_expert_norm(torch.where(present, rows, 1))
    return combine(config, rows, dispatched, routing)


# Configs by their repr. Dynamo cannot trace the construction of a config, and constants that it is given must be
# strings: configs are made outside the traced code and looked up inside. Equal modules share one, and a graph guards on
# its identity.
_CONFIGS: dict[str, MoEConfig] = {}


@constant_while_tracing
def _key_of_config(
    running: str, known: bool, gated: bool, in_out: bool, gate: object, act: object, *texts: str | None
) -> str:
    return _make_config(running, known, gated, in_out, gate, act, *texts)


@functools.lru_cache(maxsize=1024)
def _make_config(
    running: str, known: bool, gated: bool, in_out: bool, gate: object, act: object, *texts: str | None
) -> str:
    """Makes a config and returns its key; texts are num_experts, top_k, the inner sizes of down and the numbers of the
    gate.
    """
    numbers = tuple(None if text is None else float.fromhex(text) for text in texts)
    experts, top_k, *inner = (int(n or 0) for n in numbers[:4])
    hidden, intermediate = reversed(inner) if in_out else inner
    activation, interleaved = activation_of(gated, gate, act, numbers[4:]) if known else (as_activation("silu"), False)
    config = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        zero_experts=padding_experts(experts, top_k),
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation,
        gate_up_layout="interleaved" if interleaved else "packed",
        weight_layout="in_out" if in_out else "out_in",
        **json.loads(running),
    )
    key = repr(config)
    _CONFIGS.setdefault(key, config)
    return key


def _text(number: float | None) -> str | None:
    """The number as a string, exactly: Dynamo makes numbers that differ between layers or calls symbolic, never
    strings.
    """
    return None if number is None else float(number).hex()


def _number(module: nn.Module, place: str | None) -> float | None:
    value: Any = module
    if place is None:
        return None
    for name in place.split("."):
        value = getattr(value, name)
    return value  # type: ignore[no-any-return]


def _gate_of(module: nn.Module) -> object:
    """The function `_apply_gate` of the module's class; None if the instance overrides it."""
    cls: Any = type(module)
    return None if "_apply_gate" in module.__dict__ else cls._apply_gate


def _act_of(module: nn.Module) -> object:
    """The class of act_fn, or act_fn if it is a function; None without one, or if it must be called (hooks)."""
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.Module):
        return type(act) if calls_known_modules_only(act) else None
    return act if isinstance(act, FunctionType | BuiltinFunctionType) else None


def _weights_of(module: nn.Module) -> MoEWeights:
    """The module's parameters, not copied."""
    part: Any = module
    up = "gate_up_proj" if part.has_gate else "up_proj"
    gate_up, down = getattr(part, up), part.down_proj
    for name, weight in ((up, gate_up), ("down_proj", down)):
        if weight.dtype not in _DTYPES or weight.dtype != gate_up.dtype:
            raise ValueError(
                f"{_name(module)}: {name} is {weight.dtype}; expected float weights of one dtype, not quantized ones"
            )
        if weight.ndim != 3 or weight.shape[0] != part.num_experts:
            shape = tuple(weight.shape)
            raise ValueError(
                f"{_name(module)}: {name} is {shape}; expected 3 dims, the first num_experts={part.num_experts}"
            )
    ends = (gate_up.shape[1], down.shape[2]) if part.is_transposed else (gate_up.shape[2], down.shape[1])
    if ends[0] != ends[1]:
        raise ValueError(
            f"{_name(module)}: {up} has {ends[0]} inputs and down_proj has {ends[1]} outputs; "
            "expected the hidden size for both"
        )
    gate_up_bias, down_bias = (getattr(part, f"{up}_bias"), part.down_proj_bias) if part.has_bias else (None, None)
    for name, tensor in (
        (up, gate_up),
        ("down_proj", down),
        (f"{up}_bias", gate_up_bias),
        ("down_proj_bias", down_bias),
    ):
        if tensor is not None and not is_plain(tensor):
            kind = type(tensor).__name__
            raise ValueError(
                f"{_name(module)}: {name} is a {kind}; expected a plain tensor, neither quantized nor distributed"
            )
    return MoEWeights(gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias)


def _name(module: nn.Module) -> str:
    return f"experts_implementation of {type(module).__name__}"
