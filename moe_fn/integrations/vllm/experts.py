"""A modular experts class with vLLM's interface that calls moe_forward_routed."""

import functools
import inspect
from typing import Any, cast

from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.forward import moe_forward_routed
from moe_fn.integrations.vllm.arguments import ACTIVATIONS, ActivationOptions, call_of_arguments, config_of_sizes
from moe_fn.integrations.vllm.host import VERSIONS, Host, installed_host

_QUANT_SCALES = ("a1q_scale", "a2_scale")


class _Experts:
    """Mixin with moe_fn's part of the class; it precedes vLLM's base class and implements its abstract methods."""

    host: Host

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)  # type: ignore[call-arg]
        # The layer's config is made here, from the host's config: Dynamo cannot trace its construction in `apply`.
        self.moe_fn_config = _config(
            self, moe_config.num_local_experts, moe_config.experts_per_token, moe_config.hidden_dim,
            moe_config.intermediate_size_per_partition, moe_config.activation,
        )  # fmt: skip

    @classmethod
    def activation_format(cls) -> Any:
        return cls.host.standard

    @classmethod
    def _supports_current_device(cls) -> bool:
        return bool(cls.host.platform.is_cuda() or cls.host.platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        """Tensor parallelism, and expert parallelism in which all ranks have all tokens; not all-to-all, which has not
        been tested.
        """
        return not (moe_parallel_config.use_all2all_kernels or moe_parallel_config.use_passthrough_all2all)

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return False  # moe_fn's back-ends do not guarantee it

    @staticmethod
    def supports_lora() -> bool:
        return False

    def finalize_weight_and_reduce_impl(self) -> Any:
        return self.host.reduced()

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
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Empty workspaces and the output [M, K]: moe_fn allocates its own."""
        return (0,), (0,), (M, K)

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation: Any,
        global_num_experts: int, expert_map: Tensor | None, a1q_scale: Tensor | None, a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor, expert_tokens_meta: Any, apply_router_weight_on_input: bool,
    ) -> None:  # fmt: skip
        """Writes the weighted and reduced output [M, K]; it is copied once, because the interface passes the buffer."""
        for name, scale in zip(_QUANT_SCALES, (a1q_scale, a2_scale), strict=True):
            if scale is not None:
                raise ValueError(f"MoeFnExperts.apply: {name} is given; expected None: these experts are not quantized")
        if w1.ndim != 3 or w2.ndim != 3 or topk_ids.ndim != 2:
            shapes = [tuple(t.shape) for t in (w1, w2, topk_ids)]
            raise ValueError(f"MoeFnExperts.apply: w1, w2, topk_ids are {shapes}; expected 3, 3 and 2 dimensions")
        of_host, config = cast(Any, self), self.moe_fn_config
        sizes = (w1.shape[0], topk_ids.shape[1], w1.shape[2], w2.shape[2])
        announced = (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size)
        if sizes != announced or activation is not of_host.moe_config.activation:
            config = _config(self, *sizes, activation)  # padded weights, for example
        call = call_of_arguments(
            config,
            w1=w1,
            w2=w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            w1_bias=of_host.w1_bias,
            w2_bias=of_host.w2_bias,
        )
        output.copy_(moe_forward_routed(call.config, call.weights, hidden_states, call.routing))


def _config(
    experts: Any, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int, activation: Any
) -> MoEConfig:
    c = experts.activation_config
    options = ActivationOptions(
        clamp_limit=c.clamp_limit,
        alpha=c.alpha,
        beta=c.beta,
        activation_situ_beta=c.activation_situ_beta,
        activation_situ_linear_beta=c.activation_situ_linear_beta,
    )
    return config_of_sizes(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=activation.value,
        options=options,
    )


def experts_class(host: Host | None = None) -> Any:
    """MoeFnExperts, a subclass of vLLM's FusedMoEExpertsModular, from the installed vLLM or from the parts in `host`.

    It supports unquantized experts in the Standard activation format on CPUs and CUDA devices, with every activation of
    ACTIVATIONS, biases, and an expert_map. By vLLM's predicates it refuses quantization, LoRA, batch invariance and
    all-to-all communication.

    Raises ImportError without vLLM, and ValueError for a version or an interface that it was not written for.
    """
    return _class_of(installed_host() if host is None else host)


@functools.lru_cache
def _class_of(host: Host) -> Any:
    check_interface(host)
    members = {"host": host, "__module__": __name__, "__doc__": "Experts computed with moe_fn."}
    return type("MoeFnExperts", (_Experts, host.experts), members)


def check_interface(host: Host) -> None:
    """Raises ValueError if the base class has abstract methods or parameters that are not implemented here."""
    unknown = sorted(name for name in getattr(host.experts, "__abstractmethods__", ()) if not hasattr(_Experts, name))
    if unknown:
        raise ValueError(
            f"MoeFnExperts: vLLM {host.version} has abstract methods {unknown}; expected only those of vLLM {VERSIONS}"
        )
    for name in ("apply", "workspace_shapes"):
        theirs, ours = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (host.experts, _Experts))
        if theirs != ours:
            raise ValueError(
                f"MoeFnExperts: {name} of vLLM {host.version} takes {theirs}; expected {ours} as in vLLM {VERSIONS}"
            )
