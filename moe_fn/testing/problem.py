"""One drawn problem: everything that a layer's forward takes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import MoEWeights


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MoEProblem:
    """A config and tensors that fit it: what `problems()` draws, and what `moe_fn.moe_forward` takes.

    x [..., H]; logits [..., num_logits], or None where the gate is inside the layer; token_ids [...] int64 for hash
    routing; token_mask [...] bool, False on padding, whose rows of x and logits hold NaN and infinities; adapter_ids
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
        """The problem with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_config(self, **changes: Any) -> Self:
        """The problem with other fields of its config."""
        return self.replace(config=dataclasses.replace(self.config, **changes))

    def of_tokens(self, index: Tensor) -> Self:
        """The problem of some of its tokens, laid flat."""

        def chosen(name: str, extra: int) -> Tensor | None:
            value = getattr(self, name)
            return None if value is None else value.reshape(-1, *value.shape[value.ndim - extra :])[index]

        rows = {name: chosen(name, 1) for name in ("x", "logits")}
        return self.replace(**rows, **{name: chosen(name, 0) for name in ("token_ids", "token_mask", "adapter_ids")})

    def call(self, fn: Callable[..., Any]) -> Any:
        """fn(config, weights, x, logits, token_ids=..., token_mask=...), and adapter_ids=... where there are any."""
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
        """Short enough to read in a failing test: what differs from the defaults, and tensors by shape unless they are
        small.
        """
        parts = [f"config={_changes(self.config)}", f"weights={_contents(self.weights)}"]
        for name in ("x", "logits", "token_ids", "token_mask", "adapter_ids"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={_short(value)}")
        return f"MoEProblem({', '.join(parts)})"


def _changes(config: Any) -> str:
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words.append(f"{field.name}={_changes(value) if dataclasses.is_dataclass(value) else repr(value)}")
    return f"{type(config).__name__}({', '.join(words)})"


def _contents(weights: Any) -> str:
    words = []
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if value is not None:
            words.append(f"{field.name}={_short(value) if isinstance(value, Tensor) else _contents(value)}")
    return f"{type(weights).__name__}({', '.join(words)})"


def _short(value: Tensor) -> str:
    about = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"<{about} {value.tolist()}>" if 0 < value.numel() <= 8 else f"<{about}>"
