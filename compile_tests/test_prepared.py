"""Prepared weights in compile, export and AOTInductor, saved and moved; and memory and kernels of the native layer."""

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import metrics
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

import moe_fn
from compile_tests.cases import TORCH_2_11
from moe_fn import MoEConfig, MoEWeights
from moe_fn.kernels.native import library as native
from moe_fn.testing import assert_matches, assert_one_graph, weights_for

pytestmark = pytest.mark.skipif(native.active().problem is not None, reason="no native kernels here")

CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=40, intermediate_size=24)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def layer(weights: MoEWeights, x: Tensor, logits: Tensor) -> Tensor:
    return moe_fn.moe_forward(CONFIG, weights, x, logits)


def prepared(dtype: torch.dtype = torch.float32) -> MoEWeights:
    weights = moe_fn.prepare_weights(CONFIG, weights_for(CONFIG, seed=1, dtype=dtype, bias=True))
    assert weights.gate_up.ndim == 4
    return weights


def tokens_of(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 40, generator=generator).to(dtype), torch.randn(count, 6, generator=generator)


@DTYPES
def test_one_graph_serves_every_token_count(dtype: torch.dtype) -> None:
    weights = prepared(dtype)
    assert_one_graph(lambda x, logits: layer(weights, x, logits), lambda n: tokens_of(n, dtype), (3, 0, 1, 20, 1000))


def test_gradients_reach_prepared_weights() -> None:
    plain, x, logits = weights_for(CONFIG, seed=1, bias=True), *tokens_of(9)
    packed = moe_fn.prepare_weights(CONFIG, plain)
    plain, packed = (tree_map(lambda t: t.clone().requires_grad_(), w) for w in (plain, packed))
    for weights in (plain, packed):
        torch.compile(layer, fullgraph=True)(weights, x, logits).square().sum().backward()
    of_packed = moe_fn.prepare_weights(CONFIG, MoEWeights(gate_up=plain.gate_up.grad, down=plain.down.grad))
    assert_matches(packed.gate_up.grad, of_packed.gate_up, scale=0.1)
    assert_matches(packed.down.grad, of_packed.down, scale=0.1)


class Frozen(nn.Module):
    """A module with the layer's weights as attributes."""

    def __init__(self, weights: MoEWeights) -> None:
        super().__init__()
        self.weights = weights
        for number, leaf in enumerate(tree_leaves(weights)):
            self.register_buffer(f"leaf_{number}", leaf)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return layer(self.weights, x, logits)


# The C++ compiler takes 5 s for a package, whatever the dtype.
EXPORTED = [(torch.float32, False), (torch.bfloat16, True)]
EXPORTED += [pytest.param(dtype, not packaged, marks=pytest.mark.thorough) for dtype, packaged in EXPORTED]


@pytest.mark.parametrize(("dtype", "packaged"), EXPORTED)
def test_export_and_packages_take_them(dtype: torch.dtype, packaged: bool, tmp_path: Path) -> None:
    weights, tokens = prepared(dtype), Dim("tokens", min=0, max=4096)
    shapes = ({0: tokens}, {0: tokens})
    program = torch.export.export(Frozen(weights), tokens_of(7, dtype), dynamic_shapes=shapes)
    run: Callable[..., Tensor] = program.module()
    if packaged:
        run = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        )
    for count in (1, 2, 9, 100):
        assert_matches(run(*tokens_of(count, dtype)), layer(weights, *tokens_of(count, dtype)), scale=0.1)


def test_they_are_saved_moved_and_loaded_like_any_tensor() -> None:
    weights, file = prepared(), io.BytesIO()
    torch.save({"gate_up": weights.gate_up, "down": weights.down}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = MoEWeights(gate_up=state["gate_up"].to("cpu", copy=True), down=state["down"])
    expected = MoEWeights(gate_up=weights.gate_up, down=weights.down)
    assert_matches(layer(again, *tokens_of(5)), layer(expected, *tokens_of(5)), tolerance=0.0)


@pytest.mark.parametrize("scale", (False, True))
def test_inductor_makes_few_kernels(scale: bool) -> None:
    """With given logits the router and the experts are calls. Where experts have a scale torch's ops route: kernels
    for scores, their keys, and weights of chosen scores.
    """
    weights = prepared() if scale else replace(prepared(), router=None)
    torch._dynamo.reset()
    metrics.reset()
    # with a cache no kernel would be generated
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(layer, fullgraph=True)(weights, *tokens_of(9))
    most = (9 if TORCH_2_11 else 5) if scale else 0
    assert min(most, 1) <= metrics.generated_kernel_count <= most


PEAK = """
import dataclasses, sys, torch, moe_fn
sizes = {"num_experts": 8, "top_k": 4, "hidden_size": 256, "intermediate_size": 1024}
config = moe_fn.MoEConfig(**sizes)
weights = moe_fn.MoEWeights(gate_up=torch.randn(8, 2048, 256), down=torch.randn(8, 256, 1024))
weights = moe_fn.prepare_weights(config, weights)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
def megabytes(tokens, chunk_tokens):
    own = dataclasses.replace(config, chunk_tokens=chunk_tokens)
    x, logits = torch.randn(tokens, 256), torch.randn(tokens, 8)
    moe_fn.moe_forward(own, weights, x[:64], logits[:64])
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    moe_fn.moe_forward(own, weights, x, logits)
    return peak() - before
with torch.no_grad():
    print(megabytes(2048, None), megabytes(8192, 512), megabytes(8192, None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_bounded() -> None:
    folder = Path(moe_fn.__file__).parents[1]
    # freed memory is returned to the system at once, so that later measurements do not count it
    command = ["env", "MALLOC_MMAP_THRESHOLD_=65536", sys.executable, "-c", PEAK]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    few, chunked, many = map(float, run.stdout.split())
    rows, of_a_row = 2048 * 4, 2 * 1024 + 256
    assert few < 1.5 * rows * of_a_row * 4 / 2**20
    assert chunked < 0.5 * many
