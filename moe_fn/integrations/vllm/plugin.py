"""The entry point, and how MoeFnExperts gets into vLLM's layers: its own out-of-tree replacement of
UnquantizedFusedMoEMethod.
"""

import logging
from typing import Any

from moe_fn.integrations.vllm.experts import check_interface, experts_class
from moe_fn.integrations.vllm.host import Host, installed_host

_REPLACED = "UnquantizedFusedMoEMethod"
_logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, so that its handlers show it


def register() -> None:
    """The entry point of `vllm.general_plugins`; vLLM calls it in every process, perhaps more than once.

    Does nothing unless VLLM_PLUGINS names moe_fn, for being installed is no wish. Never raises: a vLLM that does not
    fit keeps its own experts, and the log says why.
    """
    try:
        from vllm import envs

        if "moe_fn" not in (envs.VLLM_PLUGINS or ()):
            _logger.debug(
                "moe_fn is installed and not asked for; VLLM_PLUGINS=moe_fn has it compute unquantized MoE layers"
            )
            return
        host = installed_host()
        check_interface(host)
        _replace_method(host)
    except (ImportError, AttributeError, ValueError) as error:
        _logger.warning("moe_fn: vLLM keeps its own experts, for %s", error)


def _replace_method(host: Host) -> None:
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot

    there = op_registry_oot.get(_REPLACED)
    if there is None:
        CustomOp.register_oot(method_class(host), name=_REPLACED)
        _logger.info("moe_fn computes the unquantized MoE layers that it supports")
    elif there.__module__ != __name__:
        raise ValueError(
            f"{_REPLACED} is {there.__module__}.{there.__name__} already; expected no other plug-in for it"
        )


def method_class(host: Host) -> Any:
    """vLLM's unquantized method with MoeFnExperts where they support the layer, and what vLLM selects where they do
    not.
    """
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    # Of these two the method leaves the weights as they were loaded: [E, N, K] and [E, K, I].
    backend = UnquantizedMoeBackend.CPU if host.platform.is_cpu() else UnquantizedMoeBackend.TRITON

    class MoeFnMoEMethod(UnquantizedFusedMoEMethod):
        """Unquantized experts by moe_fn."""

        def __init__(self, moe: Any) -> None:
            super().__init__(moe)
            why = why_not(host, moe)
            if why is None:
                self.unquantized_backend, self.experts_cls = backend, experts_class(host)
            else:
                _logger.warning("moe_fn: this layer keeps vLLM's experts, for %s", why)

    return MoeFnMoEMethod


def why_not(host: Host, moe: Any) -> str | None:
    """Why a layer (a FusedMoEConfig) keeps vLLM's experts; None where moe_fn can compute it."""
    if moe.moe_backend != "auto":
        return f"moe_backend={moe.moe_backend!r} was asked for"
    if moe.moe_parallel_config.use_batched_activation_format:
        return "its tokens come in the batched format"
    cls = experts_class(host)
    supported, reason = cls.is_supported_config(cls, moe, None, None, host.standard)
    return None if supported else str(reason)
