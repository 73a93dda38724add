"""Tables that map the gates and activations of transformers' experts to an `ActivationConfig`.

A gate is recognized by its source code and not by its class: a copy in another model is recognized too, and a newer
version that computes something else is not. For an unknown gate the lookup returns None, and the module's own gate is
called (`experts.by_stages_of_module`).
"""

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass

from moe_fn.config import ActivationConfig
from moe_fn.config.activation import GateFunction
from moe_fn.torch_compat import constant_while_tracing

NUMBERS = ("limit", "alpha", "gate_cap", "up_cap")  # fields of ActivationConfig whose values are attributes of a module


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One `_apply_gate`: its code in the form of ast.unparse, and the activation that it computes.

    The fields in NUMBERS are names of attributes of the module that hold the number, dotted for nested modules.
    """

    code: str
    function: GateFunction | None = None  # None: given by act_fn
    limit: str | None = None
    alpha: str | None = None
    gate_cap: str | None = None
    up_cap: str | None = None
    up_offset: float = 0.0
    interleaved: bool = False


_HALVES = "gate, up = {0}.chunk(2, dim=-1)\n"
_CLAMPS = "gate = gate.clamp({none}max=self.{0})\nup = up.clamp(min=-self.{0}, max=self.{0})\n"
_SIGMOID = "glu = gate * torch.sigmoid(gate * self.{0})\n"

GATES: tuple[Gate, ...] = (
    # The default of the decorator, used by 56 classes.
    Gate(code=_HALVES.format("gate_up_out") + "return self.act_fn(gate) * up"),
    # Beam computes it in float32, as moe_fn always does.
    Gate(code=_HALVES.format("gate_up") + "return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)"),
    # DeepSeek-V4.
    Gate(
        code=_HALVES.format("gate_up") + _CLAMPS.format("limit", none="") + "return self.act_fn(gate) * up",
        limit="limit",
    ),
    # GLM-5-Next, Hunyuan-V4.
    Gate(
        code=_HALVES.format("gate_up") + _CLAMPS.format("swiglu_limit", none="min=None, ") + "return F.silu(gate) * up",
        function="silu",
        limit="swiglu_limit",
    ),
    # gpt-oss.
    Gate(
        code="gate, up = (gate_up[..., ::2], gate_up[..., 1::2])\n"
        + _CLAMPS.format("limit", none="min=None, ")
        + _SIGMOID.format("alpha")
        + "gated_output = (up + 1) * glu\nreturn gated_output",
        function="silu",
        limit="limit",
        alpha="alpha",
        up_offset=1.0,
        interleaved=True,
    ),
    # OpenAI's privacy filter.
    Gate(
        code=_HALVES.format("gate_up")
        + _CLAMPS.format("limit", none="min=None, ")
        + _SIGMOID.format("alpha")
        + "gated_output = (up + 1) * glu\nreturn gated_output",
        function="silu",
        limit="limit",
        alpha="alpha",
        up_offset=1.0,
    ),
    # MiniMax-M3-VL.
    Gate(
        code=_HALVES.format("gate_up")
        + _CLAMPS.format("swiglu_limit", none="")
        + _SIGMOID.format("swiglu_alpha")
        + "return (up + 1.0) * glu",
        function="silu",
        limit="swiglu_limit",
        alpha="swiglu_alpha",
        up_offset=1.0,
    ),
    # Inkling-2: act_fn is a module of both halves.
    Gate(
        code=_HALVES.format("gate_up") + "return self.act_fn(gate, up)",
        gate_cap="act_fn.gate_softcap.softcap",
        up_cap="act_fn.up_softcap.softcap",
    ),
)

# The full name of act_fn or its class -> function of ActivationConfig, and silu's alpha.
ACTIVATIONS: dict[str, tuple[GateFunction, float]] = {
    "transformers.activations.SiLUActivation": ("silu", 1.0),
    "torch.nn.modules.activation.SiLU": ("silu", 1.0),
    "torch.nn.functional.silu": ("silu", 1.0),
    "transformers.activations.QuickGELUActivation": ("silu", 1.702),
    "transformers.activations.GELUActivation": ("gelu", 1.0),
    "transformers.activations.GELUTanh": ("gelu_tanh", 1.0),
    "transformers.activations.NewGELUActivation": ("gelu_tanh", 1.0),
    "transformers.activations.AccurateGELUActivation": ("gelu_tanh", 1.0),
    "torch.nn.modules.activation.ReLU": ("relu", 1.0),
    "torch.nn.functional.relu": ("relu", 1.0),
    "transformers.activations.ReLUSquaredActivation": ("relu2", 1.0),
    "transformers.models.inkling2.modeling_inkling2.Inkling2SoftcappedSwiGLU": ("situ", 1.0),
}

_GATE_OF_CODE = {gate.code: gate for gate in GATES}
_PLAIN = Gate(code="")  # experts that are not gated: only act_fn


@constant_while_tracing
def places_of_numbers(gated: bool, gate: object, act: object) -> tuple[str | None, ...] | None:
    """Names of the attributes with the module's NUMBERS; None if `gate` (the function _apply_gate) or `act` (act_fn, or
    its class) is unknown.
    """
    found = _known(gated, gate, act)
    return None if found is None else tuple(getattr(found[0], name) for name in NUMBERS)


def activation_of(
    gated: bool, gate: object, act: object, numbers: tuple[float | None, ...]
) -> tuple[ActivationConfig, bool]:
    """The activation of a known gate, given its NUMBERS, and whether the columns of gates and ups alternate."""
    found = _known(gated, gate, act)
    if found is None:
        raise ValueError(
            f"activation_of: {gate} with {act} is not in the tables; expected a gate that places_of_numbers finds"
        )
    row, function, alpha = found
    limit, own_alpha, gate_cap, up_cap = numbers
    activation = ActivationConfig(
        function=function,
        gated=gated,
        limit=limit,
        alpha=alpha if own_alpha is None else own_alpha,
        up_offset=row.up_offset,
        gate_cap=gate_cap,
        up_cap=up_cap,
    )
    return activation, row.interleaved


@functools.lru_cache
def _known(gated: bool, gate: object, act: object) -> tuple[Gate, GateFunction, float] | None:
    """The gate's row, the function and silu's alpha."""
    row = _GATE_OF_CODE.get(_code_of(gate)) if gated else _PLAIN
    if row is None:
        return None
    if row.function is not None:
        return row, row.function, 1.0
    found = ACTIVATIONS.get(f"{getattr(act, '__module__', '')}.{getattr(act, '__qualname__', '')}")
    if found is None or (found[0] == "situ") != (row.gate_cap is not None):
        return None
    return row, *found


def _code_of(function: object) -> str:
    """The body of a function without docstring, comments and formatting; "" without source."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return "\n".join(ast.unparse(statement) for statement in body)
