"""The config of the whole layer, and its way to JSON and back."""

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from moe_fn.checks import check_bool, check_choice, check_int
from moe_fn.config.activation import ActivationConfig, ActivationName, as_activation
from moe_fn.config.invariance import check_batch_invariant
from moe_fn.config.local import own_fields
from moe_fn.config.lora import LoRAConfig
from moe_fn.config.parallel import ParallelConfig, RankGroup
from moe_fn.config.parts import ExpertNormConfig, LatentConfig, NormsConfig, SharedExpertsConfig, ZeroExpertsConfig
from moe_fn.config.quant import ActivationQuantConfig, QuantConfig
from moe_fn.config.router import GroupConfig, RouterConfig

Backend = Literal["auto", "torch", "native", "triton"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The whole layer. Sizes are those of the model: `num_experts` counts the experts that have weights.

    gate_up_layout   columns of gate_up's product: gate then up ("packed"), or alternating ("interleaved", gpt-oss)
    weight_layout    weights are [E, out, in], or [E, in, out] ("in_out": Llama-4, gpt-oss)
    norms            root-mean-square norms before the gate, before the routed experts, after everything
    quant            how gate_up and down are stored in few bits (`moe_fn.quantize_weights`), and what their inputs are
                     rounded to
    lora             low-rank adapters on the experts, and how many there are to choose among
    parallel         which ranks share the layer; sizes above stay those of the whole, weights are this rank's
                     (`moe_fn.shard_weights`)
    hidden_padding   zeros appended to the routed input, and cut off its output: the experts are wider than the model
    chunk_tokens     tokens worked on at a time, which bounds peak memory in forward and backward; None: all
    recompute        gradients compute the first product again (2 of 9 parts of all products) instead of keeping rows x
                     2I for it
    batch_invariant  a token's bits, and those of its gradient, depend neither on the other tokens nor on how many there
                     are. The layer is then one node in the graph, for the code that a compiler makes of a row depends
                     on the shapes; a back-end that cannot promise it raises. Over more than two ranks sums want
                     RankGroup.ordered
    backend          what computes the experts; `moe_fn.backends()` says what there is
    opaque           the whole layer is one node in the graph, for hosts that want it

    Raises ValueError naming the field, what came and what was expected.

    >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=128)
    >>> MoEConfig.from_dict(config.to_dict()) == config
    True
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    router: RouterConfig = RouterConfig()
    activation: ActivationConfig | ActivationName = "silu"
    gate_up_layout: Literal["packed", "interleaved"] = "packed"
    weight_layout: Literal["out_in", "in_out"] = "out_in"
    expert_norm: ExpertNormConfig | None = None
    shared: SharedExpertsConfig | None = None
    latent: LatentConfig | None = None
    zero_experts: ZeroExpertsConfig | None = None
    norms: NormsConfig | None = None
    quant: QuantConfig | None = None
    lora: LoRAConfig | None = None
    parallel: ParallelConfig | None = None
    hidden_padding: int = 0
    chunk_tokens: int | None = None
    recompute: bool = False
    batch_invariant: bool = False
    backend: Backend = "auto"
    opaque: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            check_int(f"MoEConfig.{name}", getattr(self, name), 1)
        check_int("MoEConfig.hidden_padding", self.hidden_padding, 0)
        if self.chunk_tokens is not None:
            check_int("MoEConfig.chunk_tokens", self.chunk_tokens, 1)
        check_choice("MoEConfig.gate_up_layout", self.gate_up_layout, ("packed", "interleaved"))
        check_choice("MoEConfig.weight_layout", self.weight_layout, ("out_in", "in_out"))
        check_choice("MoEConfig.backend", self.backend, get_args(Backend))
        for name in ("recompute", "batch_invariant", "opaque"):
            check_bool(f"MoEConfig.{name}", getattr(self, name))
        for name, kind in _NESTED.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"MoEConfig.{name} is {getattr(self, name)!r}; expected {kind}")
        activation = as_activation(self.activation)
        if not activation.gated and self.gate_up_layout == "interleaved":
            raise ValueError("MoEConfig.gate_up_layout='interleaved' would have no effect: expected a gated activation")
        self._check_routing()
        self._check_quant()
        if self.batch_invariant:
            check_batch_invariant(self.router, self.quant, self.parallel)
        # Not a field: what the whole-layer op takes, ready before any tracing (json does not trace).
        object.__setattr__(self, "_json", json.dumps(self.to_dict(), sort_keys=True))
        object.__setattr__(
            self, "_own", None if self.parallel is None else MoEConfig(**own_fields(self, self.parallel))
        )

    @property
    def json(self) -> str:
        """The config as JSON, with sorted keys: what ops take, and what tables of shapes are cached by."""
        return self._json  # type: ignore[attr-defined, no-any-return]

    def __eq__(self, other: object) -> bool:
        # Itself first: torch.compile guards on a config by comparing it in every call, nearly always with itself.
        if self is other or not isinstance(other, MoEConfig):
            return self is other
        return all(getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(self))

    def _check_routing(self) -> None:
        choices, router, groups = self.num_choices, self.router, self.router.groups
        if self.top_k > choices:
            raise ValueError(
                f"MoEConfig.top_k={self.top_k}; expected at most the {choices} experts there are to choose from"
            )
        if router.selection == "sparsemixer" and self.top_k != 2:
            raise ValueError(f"MoEConfig.top_k={self.top_k} with router.selection='sparsemixer': expected 2")
        if self.zero_experts is not None and (router.scale_on != "weights" or router.weight_on == "input"):
            raise ValueError(
                "MoEConfig.zero_experts: expected router.scale_on='weights' and router.weight_on='output', for they "
                "bypass the experts"
            )
        if self.shared is not None and self.shared.gate == "router" and router.selection == "sparsemixer":
            raise ValueError(
                "MoEConfig.shared.gate='router' with router.selection='sparsemixer': expected scores that can be shared"
            )
        if self.shared is not None and self.shared.gate == "router" and router.scoring == "softmax":
            raise ValueError(
                "MoEConfig.shared.gate='router' with router.scoring='softmax': "
                "expected a score of one logit alone, such as 'sigmoid'"
            )
        if router.gate_input == "transformed" and self.norms is not None and self.norms.gate:
            raise ValueError(
                "MoEConfig.norms.gate=True with router.gate_input='transformed': "
                "expected a gate that sees the original input"
            )
        if router.gate_input == "transformed" and self.latent is None and self.hidden_padding == 0:
            raise ValueError(
                "MoEConfig.router.gate_input='transformed' would have no effect: expected latent or hidden_padding"
            )
        if groups is not None:
            self._check_groups(groups)

    def _check_quant(self) -> None:
        quant = self.quant
        if quant is None:
            return
        if self.weight_layout != "out_in":
            raise ValueError(
                f"MoEConfig.weight_layout={self.weight_layout!r} with quant: expected 'out_in', for scales go along "
                "the inputs"
            )
        for name in ("expert_hidden_size", "intermediate_size"):
            if getattr(self, name) % quant.per_byte:
                raise ValueError(
                    f"MoEConfig.{name}={getattr(self, name)} with quant.scheme={quant.scheme!r}: expected an even one"
                )
        if quant.rounds_by_call and (self.chunk_tokens is not None or self.parallel is not None):
            raise ValueError(
                "MoEConfig.quant.activations of granularity 'tensor', not static, with chunk_tokens or parallel: "
                "expected 'token', for a "
                "scale of all rows is not that of a part of them"
            )

    def _check_groups(self, groups: GroupConfig) -> None:
        size, rest = divmod(self.num_choices, groups.count)
        if rest or (groups.score == "top2_sum" and size < 2):
            raise ValueError(
                f"MoEConfig.router.groups: {self.num_choices} experts do not split into {groups.count} equal groups "
                f"with a {groups.score}; "
                f"expected a multiple of {groups.count}, {2 if groups.score == 'top2_sum' else 1} in a group at least"
            )
        if self.top_k > groups.top_k * size:
            raise ValueError(
                f"MoEConfig.top_k={self.top_k}; expected at most the {groups.top_k * size} experts of {groups.top_k} "
                "groups"
            )
        if groups.limit == "each" and self.top_k % groups.count:
            raise ValueError(
                f"MoEConfig.top_k={self.top_k} with groups.limit='each': expected a multiple of "
                f"groups.count={groups.count}"
            )

    @property
    def own(self) -> "MoEConfig":
        """The layer of this rank's experts alone, with the sizes of its weights; the config itself without
        `parallel`.
        """
        return self._own or self  # type: ignore[attr-defined, no-any-return]

    @property
    def as_op(self) -> bool:
        """Whether the whole layer is one node in a graph: asked for, or wanted by batch_invariant."""
        return self.opaque or self.batch_invariant

    @property
    def num_choices(self) -> int:
        """How many experts a token can be sent to: those with weights, then the zero experts."""
        return self.num_experts + (self.zero_experts.count if self.zero_experts else 0)

    @property
    def num_logits(self) -> int:
        """Columns of the logits: the choices, then the shared experts that the router weighs."""
        return self.num_choices + (self.shared.count if self.shared and self.shared.gate == "router" else 0)

    @property
    def routed_size(self) -> int:
        """Width of the routed input before padding: the latent size if there is one, else hidden_size."""
        return self.latent.size if self.latent else self.hidden_size

    @property
    def expert_hidden_size(self) -> int:
        """Width that the experts see: routed_size + hidden_padding."""
        return self.routed_size + self.hidden_padding

    @property
    def gate_up_parts(self) -> int:
        """Outputs of gate_up for each place of intermediate_size: 2 with a gated activation, else 1."""
        return as_activation(self.activation).gate_up_parts

    @property
    def gate_up_size(self) -> int:
        """Outputs of gate_up."""
        return self.gate_up_parts * self.intermediate_size

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config of `to_dict`. Unknown names raise ValueError."""
        config: Self = _from_dict(cls, values)
        return config


_NESTED = {
    "router": RouterConfig,
    "expert_norm": ExpertNormConfig | None,
    "shared": SharedExpertsConfig | None,
    "latent": LatentConfig | None,
    "zero_experts": ZeroExpertsConfig | None,
    "norms": NormsConfig | None,
    "quant": QuantConfig | None,
    "lora": LoRAConfig | None,
    "parallel": ParallelConfig | None,
}
_DATACLASS_OF_FIELD: dict[str, type] = {
    "router": RouterConfig,
    "groups": GroupConfig,
    "activation": ActivationConfig,
    "expert_norm": ExpertNormConfig,
    "shared": SharedExpertsConfig,
    "latent": LatentConfig,
    "zero_experts": ZeroExpertsConfig,
    "norms": NormsConfig,
    "quant": QuantConfig,
    "activations": ActivationQuantConfig,
    "lora": LoRAConfig,
    "parallel": ParallelConfig,
    **dict.fromkeys(("tp", "ep", "dp", "sp"), RankGroup),
}


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}.from_dict: got {values!r:.200}; expected a dict")
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"{cls.__name__}.from_dict: unknown names {unknown}; expected some of {names}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{cls.__name__}.from_dict: {missing} missing; expected them among {list(values)}")
    nested = {
        n: _from_dict(_DATACLASS_OF_FIELD[n], v)
        for n, v in values.items()
        if n in _DATACLASS_OF_FIELD and isinstance(v, dict)
    }
    return cls(**(values | nested))


@functools.lru_cache
def config_of_json(text: str) -> MoEConfig:
    """The config that an op's string argument stands for."""
    return MoEConfig.from_dict(json.loads(text))
