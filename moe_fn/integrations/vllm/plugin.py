"""The plug-in's entry point: it registers an out-of-tree UnquantizedFusedMoEMethod that uses MoeFnExperts."""

import logging
from typing import Any

from moe_fn.integrations.vllm.experts import check_interface, experts_class
from moe_fn.integrations.vllm.host import Host, installed_host

_REPLACED = "UnquantizedFusedMoEMethod"
_logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, so that its handlers show it


def register() -> None:
    """The entry point of `vllm.general_plugins`, which vLLM calls in every process, possibly more than once.

    Does nothing unless VLLM_PLUGINS names moe_fn: installing the package does not activate the plug-in. Never raises:
    an unsupported vLLM keeps its own experts, and a warning is logged.
    """
    try:
        from vllm import envs

        if "moe_fn" not in (envs.VLLM_PLUGINS or ()):
            _logger.debug(
                "moe_fn is installed but not enabled; VLLM_PLUGINS=moe_fn enables it for unquantized MoE layers"
            )
            return
        host = installed_host()
        check_interface(host)
        _replace_method(host)
    except (ImportError, AttributeError, ValueError) as error:
        _logger.warning("moe_fn: vLLM keeps its own experts: %s", error)


def _replace_method(host: Host) -> None:
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot

    there = op_registry_oot.get(_REPLACED)
    if there is None:
        CustomOp.register_oot(method_class(host), name=_REPLACED)
        _logger.info("moe_fn computes the unquantized MoE layers that it supports")
    elif there.__module__ != __name__:
        raise ValueError(
            f"{_REPLACED} is replaced by {there.__module__}.{there.__name__}; expected no other plug-in for it"
        )


def method_class(host: Host) -> Any:
    """A subclass of vLLM's unquantized method with MoeFnExperts for supported layers; others keep vLLM's experts."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    # With these two back-ends the method leaves the weights as loaded: [E, N, K] and [E, K, I].
    backend = UnquantizedMoeBackend.CPU if host.platform.is_cpu() else UnquantizedMoeBackend.TRITON

    class MoeFnMoEMethod(UnquantizedFusedMoEMethod):
        """Unquantized experts with moe_fn."""

        def __init__(self, moe: Any) -> None:
            super().__init__(moe)
            why = why_not(host, moe)
            if why is None:
                self.unquantized_backend, self.experts_cls = backend, experts_class(host)
            else:
                _logger.warning("moe_fn: this layer keeps vLLM's experts, because %s", why)

    return MoeFnMoEMethod


def why_not(host: Host, moe: Any) -> str | None:
    """The reason why a layer (a FusedMoEConfig) keeps vLLM's experts; None if moe_fn can compute it."""
    if moe.moe_backend != "auto":
        return f"moe_backend is {moe.moe_backend!r}"
    if moe.moe_parallel_config.use_batched_activation_format:
        return "its tokens are in the batched format"
    cls = experts_class(host)
    supported, reason = cls.is_supported_config(cls, moe, None, None, host.standard)
    return None if supported else str(reason)
