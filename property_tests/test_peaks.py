"""Peak memory of every path is what `moe_fn.bench.peaks` says, within 10 %: resident memory of one process, whose peak
starts anew.
"""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tools.soak import KINDS, SLACK, growth, inputs, of_layer

import moe_fn
from moe_fn import MoEConfig
from moe_fn.bench.peaks import forward_peak, step_peak
from moe_fn.kernels.native import library as native
from moe_fn.testing import weights_for


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of a process' memory here")
@pytest.mark.skipif(native.active().problem is not None, reason="no native kernels here")
def test_measured_peaks_are_those_of_the_formulas() -> None:
    path = os.pathsep.join([str(Path(moe_fn.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}  # noqa: TID251
    command = [sys.executable, "-m", "tools.peaks_of_paths", "2", "8,4,256,512,2048", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("by formula") == 13


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", [kind for kind, (_, other) in KINDS.items() if other is None])
def test_calls_leave_nothing_behind(kind: str) -> None:
    """`make soak` does it a thousand times, and compiles and exports."""
    assert growth(KINDS[kind][0], 30) < SLACK


def test_a_compiled_layer_that_is_gone_keeps_no_tensor() -> None:
    x, logits = inputs(0)
    gone = weakref.ref(x)
    torch.compile(of_layer, backend="aot_eager", fullgraph=True)(x, logits).sum().backward()
    del x, logits
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_a_formula_asks_for_what_it_needs_to_know() -> None:
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6)
    with pytest.raises(ValueError, match=r"MoEConfig\.backend is 'auto'; expected 'native' or 'torch'"):
        forward_peak(config, 3, weights_for(config).gate_up.dtype)
    chunked = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6, backend="torch", chunk_tokens=2)
    with pytest.raises(ValueError, match="step_peak: quant, or chunk_tokens with backend='torch'"):
        step_peak(chunked, 3, weights_for(chunked).gate_up.dtype)
