"""A copy of the published interface of vLLM 0.32.0's modular experts, for tests without vLLM.

It has the names, signatures and abstract methods of
vllm/model_executor/layers/fused_moe/{modular_kernel,activation, topk_weight_and_reduce}.py (0.33.0 has the same and
needs no more). `FusedMoEKernel` does what FusedMoEKernelModularImpl.apply does on one rank without quantization;
`apply_moe_activation` computes in torch what their compiled operators compute.
"""

import itertools
from abc import ABC, abstractmethod
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fn.integrations.vllm import Host


class FusedMoEActivationFormat(Enum):
    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


class MoEActivation(Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SITU = "situ"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        return not self.value.endswith("_no_mul")


class FusedMoEExperts(ABC):
    def __init__(
        self, moe_config: Any, quant_config: Any, max_num_tokens: int | None = None, num_dispatchers: int | None = None
    ) -> None:
        batched = self.activation_format() == FusedMoEActivationFormat.BatchedExperts
        if batched != (max_num_tokens is not None) or batched != (num_dispatchers is not None):
            raise ValueError("max_num_tokens and num_dispatchers belong to BatchedExperts")
        self.moe_config, self.quant_config = moe_config, quant_config
        self.activation_config = SimpleNamespace(
            clamp_limit=moe_config.swiglu_limit,
            alpha=1.0 if moe_config.swiglu_alpha is None else moe_config.swiglu_alpha,
            beta=0.0 if moe_config.swiglu_beta is None else moe_config.swiglu_beta,
            activation_situ_beta=moe_config.activation_situ_beta,
            activation_situ_linear_beta=moe_config.activation_situ_linear_beta,
        )

    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: B027
        pass

    @property
    def expects_unquantized_inputs(self) -> bool:
        return False

    @staticmethod
    @abstractmethod
    def activation_format() -> FusedMoEActivationFormat: ...

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: FusedMoEActivationFormat
    ) -> tuple[bool, str | None]:
        refusals = {
            "current device": not cls._supports_current_device(),
            "no act_and_mul MLP layer": not (moe_config.is_act_and_mul or cls._supports_no_act_and_mul()),
            f"{moe_config.activation} activation": not cls._supports_activation(moe_config.activation),
            f"quantization scheme {weight_key}x{activation_key}": not cls._supports_quant_scheme(
                weight_key, activation_key
            ),
            f"parallel config {moe_config.moe_parallel_config}": not cls._supports_parallel_config(
                moe_config.moe_parallel_config
            ),
            f"{activation_format.value} activation format": activation_format != cls.activation_format(),
            "LoRA": moe_config.is_lora_enabled and not cls.supports_lora(),
        }
        reason = next((reason for reason, refused in refusals.items() if refused), None)
        return reason is None, reason and f"kernel does not support {reason}"

    @staticmethod
    @abstractmethod
    def _supports_current_device() -> bool: ...

    @staticmethod
    @abstractmethod
    def _supports_no_act_and_mul() -> bool: ...

    @staticmethod
    @abstractmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool: ...

    @staticmethod
    @abstractmethod
    def _supports_activation(activation: MoEActivation) -> bool: ...

    @staticmethod
    @abstractmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool: ...

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return False

    @property
    def a2_scale(self) -> Tensor | None:
        return self.quant_config.a2_scale

    @property
    def w1_bias(self) -> Tensor | None:
        return self.quant_config.w1_bias

    @property
    def w2_bias(self) -> Tensor | None:
        return self.quant_config.w2_bias

    @staticmethod
    def supports_lora() -> bool:
        return False


class FusedMoEExpertsModular(FusedMoEExperts):
    @staticmethod
    def is_monolithic() -> bool:
        return False

    def moe_problem_size(self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        return w1.shape[0], a1.size(0), w1.shape[1], a1.size(-1), topk_ids.size(1)

    def workspace_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        return act_dtype

    @abstractmethod
    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]: ...

    @abstractmethod
    def finalize_weight_and_reduce_impl(self) -> Any: ...

    @abstractmethod
    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation: Any,
        global_num_experts: int, expert_map: Tensor | None, a1q_scale: Tensor | None, a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor, expert_tokens_meta: Any, apply_router_weight_on_input: bool,
    ) -> Any: ...  # fmt: skip


class TopKWeightAndReduceNoOP:
    def apply(self, output: Tensor, fused_expert_output: Tensor, *_: Any) -> Tensor:
        return output.copy_(fused_expert_output)


class Platform:
    """The platform of a CPU."""

    @staticmethod
    def is_cpu() -> bool:
        return True

    @staticmethod
    def is_cuda() -> bool:
        return False


HOST = Host(
    version="0.32.0, stated",
    experts=FusedMoEExpertsModular,
    standard=FusedMoEActivationFormat.Standard,
    reduced=TopKWeightAndReduceNoOP,
    platform=Platform,
)


def moe_config(
    activation: MoEActivation = MoEActivation.SILU, sizes: tuple[int, ...] = (8, 2, 16, 32), **options: Any
) -> SimpleNamespace:
    """Returns the fields of a FusedMoEConfig that experts read; sizes: local experts, top k, hidden, intermediate."""
    no_parallel = SimpleNamespace(
        use_all2all_kernels=False, use_passthrough_all2all=False, use_batched_activation_format=False
    )
    defaults = {
        "activation": activation, "is_act_and_mul": activation.is_gated, "is_lora_enabled": False,
        "moe_parallel_config": no_parallel,
        "moe_backend": "auto", "swiglu_limit": None, "swiglu_alpha": None, "swiglu_beta": None,
        "activation_situ_beta": None,
        "activation_situ_linear_beta": None,
    }  # fmt: skip
    names = ("num_local_experts", "experts_per_token", "hidden_dim", "intermediate_size_per_partition")
    return SimpleNamespace(**(defaults | dict(zip(names, sizes, strict=True)) | options))


def quant_config(w1_bias: Tensor | None = None, w2_bias: Tensor | None = None) -> SimpleNamespace:
    return SimpleNamespace(w1_bias=w1_bias, w2_bias=w2_bias, a2_scale=None)


def run_kernel(
    experts: Any, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    activation: Any,
    global_num_experts: int = -1, expert_map: Tensor | None = None, apply_router_weight_on_input: bool = False,
) -> Tensor:  # fmt: skip
    """Runs prepare, the experts with buffers full of NaN, and finalize, as the kernel does on a CPU."""
    a1 = hidden_states * topk_weights.to(hidden_states.dtype) if apply_router_weight_on_input else hidden_states
    E, M, N, K, topk = experts.moe_problem_size(a1, w1, w2, topk_ids)
    if M == 0:
        return torch.empty_like(a1)
    shapes = experts.workspace_shapes(M, N, K, topk, global_num_experts, E, None, activation)
    workspace13, workspace2, fused_out = (
        a1.new_full(shape, torch.nan, dtype=experts.workspace_dtype(a1.dtype)) for shape in shapes
    )
    experts.apply(
        output=fused_out,
        hidden_states=a1,
        w1=w1,
        w2=w2,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        activation=activation,
        global_num_experts=E if global_num_experts == -1 else global_num_experts,
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=experts.a2_scale,
        workspace13=workspace13,
        workspace2=workspace2,
        expert_tokens_meta=None,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
    output = torch.empty_like(hidden_states)
    finalize = experts.finalize_weight_and_reduce_impl()
    return finalize.apply(output, fused_out, topk_weights, topk_ids, apply_router_weight_on_input)


def apply_moe_activation(name: str, h: Tensor, c: Any) -> Tensor:
    """Returns what vLLM's operator of this name computes: silu_and_mul, silu_and_mul_with_clamp, swigluoai_and_mul,
    situ_and_mul, ...
    """
    plain = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x) ** 2,
    }
    if name.endswith("_no_mul"):
        return plain[name.removesuffix("_no_mul")](h)
    if name == "swigluoai":
        gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(gate * 1.702) * (up + 1)
    gate, up = h.chunk(2, -1)
    if name == "swigluoai_uninterleave" or (name == "silu" and c.clamp_limit is not None):
        alpha, beta = (c.alpha, c.beta) if name != "silu" else (1.0, 0.0)
        gate, up = gate.clamp(max=c.clamp_limit), up.clamp(-c.clamp_limit, c.clamp_limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)
    if name == "swiglustep":
        return F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)
    if name == "situ":
        linear = c.activation_situ_linear_beta
        up = linear * torch.tanh(up / linear) if linear is not None else up
        return c.activation_situ_beta * torch.tanh(gate / c.activation_situ_beta) * torch.sigmoid(gate) * up
    return plain[name](gate) * up


def reference(
    experts: Any,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: Any,
    expert_map: Any = None,
) -> Tensor:
    """Returns the output of the experts, computed by a loop over tokens and choices."""
    w1_bias, w2_bias = experts.quant_config.w1_bias, experts.quant_config.w2_bias
    y = torch.zeros_like(x)
    for t, j in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        e = int(ids[t, j])
        e = e if expert_map is None or e < 0 else int(expert_map[e])
        if e < 0:
            continue
        h = w1[e] @ x[t] + (0 if w1_bias is None else w1_bias[e])
        out = w2[e] @ apply_moe_activation(activation.value, h, experts.activation_config) + (
            0 if w2_bias is None else w2_bias[e]
        )
        y[t] += weights[t, j] * out
    return y
