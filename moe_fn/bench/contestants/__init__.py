"""Table of contestants: implementations of a layer to time. A package is imported only when its contestant is built."""

from moe_fn.bench.contestants.entry import Contestant
from moe_fn.bench.contestants.ggml_kernels import GGML
from moe_fn.bench.contestants.kt_kernel import KT_KERNEL
from moe_fn.bench.contestants.liger import LIGER
from moe_fn.bench.contestants.onnx_runtime import ONNX_RUNTIME
from moe_fn.bench.contestants.ours import OURS
from moe_fn.bench.contestants.packed_mm import PACKED_MM
from moe_fn.bench.contestants.scatter_moe import SCATTERMOE
from moe_fn.bench.contestants.sglang_cpu import SGLANG_CPU
from moe_fn.bench.contestants.torch_grouped import TORCH_GROUPED
from moe_fn.bench.contestants.transformers_experts import TRANSFORMERS
from moe_fn.bench.contestants.triton_kernels import TRITON_KERNELS
from moe_fn.bench.contestants.vllm_cpu import VLLM_CPU
from moe_fn.bench.contestants.vllm_triton import VLLM
from moe_fn.bench.contestants.zen import ZENTORCH

ON_CPU = (PACKED_MM, ONNX_RUNTIME, *VLLM_CPU, SGLANG_CPU, KT_KERNEL, ZENTORCH, GGML)
ON_GPU = (VLLM, TRITON_KERNELS, LIGER, SCATTERMOE)
CONTESTANTS: tuple[Contestant, ...] = (*OURS, *TRANSFORMERS, *TORCH_GROUPED, *ON_CPU, *ON_GPU)


def contestants_of_device(device: str, table: tuple[Contestant, ...] = CONTESTANTS) -> tuple[Contestant, ...]:
    """The rows for a device.

    >>> [row.name for row in contestants_of_device("cuda:0") if row.ours]
    ['moe_fn', 'moe_fn eager', 'moe_fn invariant', 'moe_fn torch', 'moe_fn unquantized']
    """
    return tuple(row for row in table if device.split(":")[0] in row.devices)


def contestants_of_names(text: str, table: tuple[Contestant, ...] = CONTESTANTS) -> tuple[Contestant, ...]:
    """The rows of a comma-separated list: "all", names, or the first word of several names.

    >>> [row.name for row in contestants_of_names("torch,moe_fn", contestants_of_device("cpu"))]
    ['moe_fn', 'torch grouped_mm', 'torch grouped_mm compiled', 'torch packed_mm']
    """
    chosen: set[str] = set()
    for part in (part.strip() for part in text.split(",")):
        names = [row.name for row in table if part in ("all", row.name)] or [
            row.name for row in table if row.name.split()[0] == part
        ]
        if not names:
            raise ValueError(f"--contestants {part}: expected all, or some of {', '.join(row.name for row in table)}")
        chosen.update(names)
    return tuple(row for row in table if row.name in chosen)
