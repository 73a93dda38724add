"""Depth of a call of the layer: the number of functions of the package between the public one and the product."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fn
from moe_fn import MoEConfig
from moe_fn.kernels.native import support as native
from moe_fn.testing import weights_for

PACKAGE = str(Path(moe_fn.__file__).parent)


class Frames(TorchDispatchMode):
    """Records the functions of the package on the stack of an op, outermost first."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.found = op, [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(self.op):
            frame, self.found = sys._getframe(), []
            while frame is not None:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    self.found.insert(0, frame.f_code.co_name)
                frame = frame.f_back  # type: ignore[assignment]
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.problem("cpu", torch.float32) is not None, reason="no native kernels here")
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_a_call_reaches_the_product_in_few_functions(weight_on: Any) -> None:
    """The last function is the op's, which chooses whether to record a gradient; weights on the input add two."""
    router = moe_fn.RouterConfig(weight_on=weight_on, renormalize=False)
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, router=router, backend="native")
    with torch.no_grad(), Frames("moe_fn.routed_experts_native") as frames:
        moe_fn.moe_forward(config, weights_for(config), torch.randn(1, 8), torch.randn(1, 4))
    assert frames.found[0] == "moe_forward" and len(frames.found) <= (9 if weight_on == "output" else 11), frames.found
