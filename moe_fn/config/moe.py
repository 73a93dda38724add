"""The config of the whole MoE layer, `MoEConfig`, and its conversion to and from JSON."""

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
from moe_fn.config.router import SCORINGS, GroupConfig, RouterConfig

Backend = Literal["auto", "torch", "native", "triton"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Config of the whole layer. `num_experts` counts the experts that have weights, on all ranks.

    gate_up_layout   outputs of gate_up: gates then ups ("packed"), or alternating ("interleaved", gpt-oss)
    weight_layout    weights are [E, out, in] ("out_in"), or [E, in, out] ("in_out": Llama-4, gpt-oss)
    norms            RMS norms of the gate's input, of the routed experts' input, of the layer's output
    quant            quantization of gate_up and down (`moe_fn.quantize_weights`), and of their inputs
    lora             LoRA adapters on the experts
    parallel         the ranks that share the layer; the sizes above stay those of the whole layer, the weights are this
                     rank's part (`moe_fn.shard_weights`)
    hidden_padding   zeros appended to the routed input and cut off its output, where experts are wider than the model
    chunk_tokens     number of tokens computed at a time, which bounds peak memory in forward and backward; None: all
    recompute        the backward pass recomputes the first product (2/9 of the FLOPs of all products) instead of saving
                     pre-activations (rows x 2I)
    batch_invariant  the bits of a token's output and gradient depend neither on the other tokens nor on their number.
                     The layer is then one node in the graph, because compiled code of a row depends on the shapes. A
                     back-end that is not batch-invariant raises. Sums over more than two ranks need RankGroup.ordered
    backend          what computes the experts; `moe_fn.backends()` lists the back-ends
    opaque           the whole layer is one node in the graph

    Raises ValueError: the field, what came and what was expected.

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
        # Not a field: ops take the config as JSON. Made here because Dynamo cannot trace the json module.
        object.__setattr__(self, "_json", json.dumps(self.to_dict(), sort_keys=True))
        object.__setattr__(
            self, "_own", None if self.parallel is None else MoEConfig(**own_fields(self, self.parallel))
        )

    @property
    def json(self) -> str:
        """The config as JSON with sorted keys: an argument of ops, and a cache key."""
        return self._json  # type: ignore[attr-defined, no-any-return]

    def __eq__(self, other: object) -> bool:
        # Identity first: a torch.compile guard compares the config in every call, nearly always with itself.
        if self is other or not isinstance(other, MoEConfig):
            return self is other
        return all(getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(self))

    def _check_routing(self) -> None:
        choices, router, groups = self.num_choices, self.router, self.router.groups
        if self.top_k > choices:
            raise ValueError(
                f"MoEConfig.top_k={self.top_k}; expected at most {choices}, the number of experts to choose from"
            )
        if router.selection == "sparsemixer" and self.top_k != 2:
            raise ValueError(f"MoEConfig.top_k={self.top_k} with router.selection='sparsemixer': expected 2")
        if self.zero_experts is not None and (router.scale_on != "weights" or router.weight_on == "input"):
            raise ValueError(
                "MoEConfig.zero_experts: expected router.scale_on='weights' and router.weight_on='output', because "
                "zero experts bypass the experts"
            )
        if self.shared is not None and self.shared.gate == "router" and router.selection == "sparsemixer":
            raise ValueError(
                "MoEConfig.shared.gate='router' with router.selection='sparsemixer': expected 'top_k' or 'hash'"
            )
        if self.shared is not None and self.shared.gate == "router" and not SCORINGS[router.scoring]:
            raise ValueError(
                f"MoEConfig.shared.gate='router' with router.scoring={router.scoring!r}: "
                "expected an elementwise score, such as 'sigmoid'"
            )
        if router.gate_input == "transformed" and self.norms is not None and self.norms.gate:
            raise ValueError(
                "MoEConfig.norms.gate=True with router.gate_input='transformed': expected gate_input='original'"
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
                f"MoEConfig.weight_layout={self.weight_layout!r} with quant: expected 'out_in', the layout "
                "of codes and scales"
            )
        for name in ("expert_hidden_size", "intermediate_size"):
            if getattr(self, name) % quant.per_byte:
                raise ValueError(
                    f"MoEConfig.{name}={getattr(self, name)} with quant.scheme={quant.scheme!r}: expected an even size"
                )
        if quant.rounds_by_call and (self.chunk_tokens is not None or self.parallel is not None):
            raise ValueError(
                "MoEConfig.quant.activations of granularity 'tensor', not static, with chunk_tokens or parallel: "
                "expected 'token', because one scale for all rows differs from the scales of parts of them"
            )

    def _check_groups(self, groups: GroupConfig) -> None:
        size, rest = divmod(self.num_choices, groups.count)
        if rest or (groups.score == "top2_sum" and size < 2):
            raise ValueError(
                f"MoEConfig.router.groups: {self.num_choices} experts in {groups.count} groups with "
                f"score={groups.score!r}; expected a multiple of {groups.count}, with at least "
                f"{2 if groups.score == 'top2_sum' else 1} in a group"
            )
        if self.top_k > groups.top_k * size:
            raise ValueError(
                f"MoEConfig.top_k={self.top_k}; expected at most {groups.top_k * size}, the number of experts in "
                f"{groups.top_k} of {groups.count} groups"
            )
        if groups.limit == "each" and self.top_k % groups.count:
            raise ValueError(
                f"MoEConfig.top_k={self.top_k} with groups.limit='each': expected a multiple of "
                f"groups.count={groups.count}"
            )

    @property
    def own(self) -> "MoEConfig":
        """The config of this rank's routed experts, with the sizes of its weights; without `parallel`, the config
        itself.
        """
        return self._own or self  # type: ignore[attr-defined, no-any-return]

    @property
    def as_op(self) -> bool:
        """Whether the whole layer is one node in a graph: opaque, or batch_invariant."""
        return self.opaque or self.batch_invariant

    @property
    def num_choices(self) -> int:
        """Number of experts that a token can be routed to: experts with weights, then zero experts."""
        return self.num_experts + (self.zero_experts.count if self.zero_experts else 0)

    @property
    def num_logits(self) -> int:
        """Number of logits: num_choices, and with shared.gate="router" one for each shared expert, last."""
        return self.num_choices + (self.shared.count if self.shared and self.shared.gate == "router" else 0)

    @property
    def routed_size(self) -> int:
        """Width of the routed input before hidden_padding: the latent size if there is one, else hidden_size."""
        return self.latent.size if self.latent else self.hidden_size

    @property
    def expert_hidden_size(self) -> int:
        """Width of the experts' input and output: routed_size + hidden_padding."""
        return self.routed_size + self.hidden_padding

    @property
    def gate_up_parts(self) -> int:
        """gate_up_size / intermediate_size: 2 with a gated activation, else 1."""
        return as_activation(self.activation).gate_up_parts

    @property
    def gate_up_size(self) -> int:
        """Number of outputs of gate_up: 2 * intermediate_size with a gated activation, else intermediate_size."""
        return self.gate_up_parts * self.intermediate_size

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as a dict of JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Returns the config of a `to_dict`. Unknown names raise ValueError."""
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
    """Returns the config of an op's JSON argument. Cached."""
    return MoEConfig.from_dict(json.loads(text))
