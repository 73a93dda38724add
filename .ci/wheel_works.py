"""Tests of an installed wheel, run by try-wheel: the README's example, the kernels built from its sources, its
metadata.
"""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import torch

import moe_fn

about = importlib.metadata.metadata("moe_fn")
assert Path(moe_fn.__file__).is_relative_to(sys.prefix), f"{moe_fn.__file__} is not in the wheel's environment"
assert about["Version"] == moe_fn.__version__ and about["License-Expression"] == "Apache-2.0"
assert (Path(moe_fn.__file__).parent / "py.typed").exists()

readme = about.get_payload() or about["Description"]
example = next(
    block
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    if block.startswith("import torch\nimport moe_fn\n")
)
names: dict[str, object] = {}
exec(example, names)  # eager and compiled
config, weights, x = names["config"], names["weights"], names["x"]
expected = moe_fn.reference.moe_forward(config, weights, x)
assert torch.allclose(names["y"].double(), expected, rtol=1e-4, atol=1e-4), "the example computes something else"

found = {info.name: info for info in moe_fn.backends()}
has_triton = importlib.util.find_spec("triton") is not None
assert found["native"].available, found["native"].reason
assert has_triton or "riton" in found["triton"].reason, found["triton"].reason
print(
    f"Python {sys.version.split()[0]}, torch {torch.__version__}, {'with' if has_triton else 'without'} Triton: "
    "the README's example runs, "
    f"native kernels: {found['native'].reason}; triton: {found['triton'].reason}"
)
