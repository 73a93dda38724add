"""MoEProblem: the arguments of one call of the layer."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import MoEWeights


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MoEProblem:
    """A config and the tensors of a call of `moe_fn.moe_forward`, as drawn by `problems()`.

    x [..., H]; logits [..., num_logits], or None where the gate is inside the layer; token_ids [...] int64 for hash
    routing; token_mask [...] bool, False on padding, whose rows of x and logits are NaN and infinities; adapter_ids
    [...] int64 for LoRA.

    >>> import torch
    >>> from moe_fn.testing import weights_for
    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=3, intermediate_size=4)
    >>> problem = MoEProblem(config=config, weights=weights_for(config), x=torch.ones(5, 3), logits=torch.ones(5, 2))
    >>> problem.replace(x=problem.x[:2], logits=problem.logits[:2]).call(lambda config, weights, x, logits,
    ...     **ids_and_mask: x.shape)
    torch.Size([2, 3])
    """

    config: MoEConfig
    weights: MoEWeights
    x: Tensor
    logits: Tensor | None = None
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    adapter_ids: Tensor | None = None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_config(self, **changes: Any) -> Self:
        """A copy with some fields of its config changed."""
        return self.replace(config=dataclasses.replace(self.config, **changes))

    def of_tokens(self, index: Tensor) -> Self:
        """The problem with only the tokens at `index`, flattened."""

        def chosen(name: str, extra: int) -> Tensor | None:
            value = getattr(self, name)
            return None if value is None else value.reshape(-1, *value.shape[value.ndim - extra :])[index]

        rows = {name: chosen(name, 1) for name in ("x", "logits")}
        return self.replace(**rows, **{name: chosen(name, 0) for name in ("token_ids", "token_mask", "adapter_ids")})

    def call(self, fn: Callable[..., Any]) -> Any:
        """fn(config, weights, x, logits, token_ids=..., token_mask=...), and adapter_ids=... if given."""
        adapters = {} if self.adapter_ids is None else {"adapter_ids": self.adapter_ids}
        return fn(
            self.config,
            self.weights,
            self.x,
            self.logits,
            token_ids=self.token_ids,
            token_mask=self.token_mask,
            **adapters,
        )

    def __repr__(self) -> str:
        """Fields that differ from the defaults; tensors by shape, and up to 8 elements by value."""
        parts = [f"config={_changes(self.config)}", f"weights={_contents(self.weights)}"]
        for name in ("x", "logits", "token_ids", "token_mask", "adapter_ids"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={_short(value)}")
        return f"MoEProblem({', '.join(parts)})"


def _changes(config: Any) -> str:
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            parts.append(f"{field.name}={_changes(value) if dataclasses.is_dataclass(value) else repr(value)}")
    return f"{type(config).__name__}({', '.join(parts)})"


def _contents(weights: Any) -> str:
    parts = []
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if value is not None:
            parts.append(f"{field.name}={_short(value) if isinstance(value, Tensor) else _contents(value)}")
    return f"{type(weights).__name__}({', '.join(parts)})"


def _short(value: Tensor) -> str:
    about = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"<{about} {value.tolist()}>" if 0 < value.numel() <= 8 else f"<{about}>"
