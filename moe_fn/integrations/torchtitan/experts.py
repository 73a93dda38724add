"""torchtitan's GroupedExperts on moe_fn: the experts' products over rows sorted by expert."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig, as_activation
from moe_fn.integrations.torchtitan.layouts import ExpertsLayout, config_of_experts, layout_of_class
from moe_fn.layer.call import autocast_dtype, autocast_off
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.grouped_matmul import GROUPED
from moe_fn.records import Dispatched, MoEWeights
from moe_fn.stages._activation import activate
from moe_fn.stages.experts import experts
from moe_fn.torch_compat import is_wrapper


def experts_of_rows(
    config: MoEConfig, gate_up: tuple[Tensor, ...], down: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """GroupedExperts.forward as a function of its weights: the MLP of each row's expert.

        y[r] = down[e] @ activation(gate[e] @ x[r], up[e] @ x[r]),  e the expert of row r

    gate_up is (gate_up [E, 2F, D],) or (w1 [E, F, D], w3 [E, F, D]); down [E, D, F]; x_RD [R, D] sorted by expert;
    num_tokens_per_expert_E [E] are counts. Returns [R, D]; rows beyond the counts are not read and give 0. All tensors
    have one dtype, in which it computes: nothing is cast to bfloat16. Gradients flow to the rows and all weights.

    Separate w1 and w3 have one product each, because concatenating them would copy every expert in every call. On one
    core of a Zen 5 with 64 experts of 512 x 1024 and 1024 rows, in ms: two weights 57 in float32 and 31 in bfloat16,
    one weight 54 and 27, concatenated in the call 194 and 93.

    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=1, intermediate_size=1)
    >>> w1, w3, w2 = torch.ones(2, 1, 1), torch.tensor([[[1.0]], [[2.0]]]), torch.ones(2, 1, 1)
    >>> experts_of_rows(config, (w1, w3), w2, torch.ones(3, 1), torch.tensor([1, 1])).flatten().tolist()
    [0.7310585975646973, 1.4621171951293945, 0.0]
    """
    expert_ends = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    if len(gate_up) == 1:
        none = expert_ends.new_empty(0, dtype=torch.int64)  # `experts` reads rows and expert_ends only
        weights = MoEWeights(gate_up=gate_up[0], down=down, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return experts(
            config, weights, Dispatched(rows=x_RD, expert_ends=expert_ends, slot_of_row=none, row_of_slot=none)
        )
    matmul = GROUPED[backend_of(config, x_RD)].matmul
    products = [matmul(x_RD, weight, expert_ends, True).to(accumulation_dtype(x_RD.dtype)) for weight in gate_up]
    hidden = activate(as_activation(config.activation), torch.cat(products, -1)).to(x_RD.dtype)
    return matmul(hidden, down, expert_ends, True)


@functools.lru_cache
def experts_class(base: Any, compute_dtype: torch.dtype | None = None) -> Any:
    """A subclass of torchtitan's GroupedExperts, FusedGroupedExperts or GptOssGroupedExperts whose forward is moe_fn's.

    Parameters, their names, initialization, sharding and state-dict hooks are the base class's. It has its own Config,
    so that it can be built and overridden like torchtitan's. It computes in compute_dtype, else in autocast's dtype,
    else in the dtype of the rows; torchtitan always computes in bfloat16. The result has the dtype of the rows.

    Raises ValueError for another base class.
    """
    layout = layout_of_class(base)
    if layout is None:
        raise ValueError(
            f"experts_class: got {base.__name__}; expected GroupedExperts, FusedGroupedExperts or GptOssGroupedExperts "
            "itself"
        )

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.moe_fn_config = config_of_experts(layout, self)

    def forward(self: Any, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return _forward(layout, compute_dtype, self, x_RD, num_tokens_per_expert_E)

    members = {
        "__init__": init,
        "forward": forward,
        "__module__": __name__,
        "__doc__": f"{base.__name__}, computed with moe_fn.",
    }
    return type(f"MoeFn{base.__name__}", (base,), members | config_member(base))


def config_member(base: Any) -> dict[str, Any]:
    """The nested Config (a slotted dataclass) that torchtitan expects in a class body; empty if the base has none."""
    if not hasattr(base, "Config"):
        return {}
    return {"Config": dataclasses.dataclass(kw_only=True, slots=True)(type("Config", (base.Config,), {}))}


def _forward(
    layout: ExpertsLayout, compute_dtype: torch.dtype | None, module: Any, x_RD: Tensor, counts: Tensor
) -> Tensor:
    dtype = compute_dtype or autocast_dtype(x_RD) or x_RD.dtype

    def local(name: str | None) -> Any:  # as in torchtitan: dynamic row counts cannot be DTensors
        tensor = None if name is None else getattr(module, name)
        if tensor is None:
            return None
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if is_wrapper(tensor):  # for example torchao's, which overrides torch's grouped product
            kind = type(tensor).__name__
            raise ValueError(
                f"{type(module).__name__}: {name} is a {kind}; expected a plain tensor, not a subclass that overrides "
                "operations"
            )
        return tensor.to(dtype)

    gate_up, down, config = tuple(local(name) for name in layout.gate_up), local(layout.down), module.moe_fn_config
    gate_up = tuple(weight.flatten(1, 2) if weight.ndim == 4 else weight for weight in gate_up)
    if layout.down_bias is not None and down.shape[-1] != config.intermediate_size:
        raise ValueError(
            f"{type(module).__name__}: {layout.down} is {tuple(down.shape)} on this rank; "
            f"expected {config.intermediate_size} columns, "
            "because tensor parallelism would add the bias on every rank: shard the experts instead"
        )
    with autocast_off(x_RD):
        y = experts_of_rows(
            config, gate_up, down, x_RD.to(dtype), counts, local(layout.gate_up_bias), local(layout.down_bias)
        )
    return y.to(x_RD.dtype)
