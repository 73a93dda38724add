"""The layer in threads, forks, spawned processes and deterministic mode, and its bits for any number of threads."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, SharedExpertsConfig
from moe_fn.kernels.native import library as native
from moe_fn.testing import weights_for

NATIVE = pytest.mark.skipif(native.active().problem is not None, reason="no native kernels here")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
FORMS: dict[str, dict[str, Any]] = {
    "native": {"backend": "native", "shared": SharedExpertsConfig(intermediate_size=32)},
    "native, recompute": {"backend": "native", "recompute": True},
    "native, opaque": {"backend": "native", "opaque": True},
    "native, chunked": {"backend": "native", "chunk_tokens": 64},
    "torch": {"backend": "torch"},
}
if native.active().problem is not None:
    FORMS = {"torch": {"backend": "torch"}}
each_form = pytest.mark.parametrize("form", FORMS)
TOKENS = (1, 3, 17, 150)


def layer(form: str, dtype: torch.dtype = torch.float32) -> Callable[[int], list[Tensor]]:
    """Returns a function of the number of tokens. It returns the layer's output, and gradients of its inputs and of the
    experts, with new tensors in each call.
    """
    config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=96, **FORMS[form])
    weights = weights_for(config, dtype=dtype)

    def step(tokens: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, 64, generator=generator).to(dtype).requires_grad_()
        logits = torch.randn(tokens, 8, generator=generator).requires_grad_()
        gate_up, down = (t.detach().clone().requires_grad_() for t in (weights.gate_up, weights.down))
        y = moe_fn.moe_forward(config, dataclasses.replace(weights, gate_up=gate_up, down=down), x, logits)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, logits, gate_up, down))]

    return step


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each_form
def test_many_python_threads_at_once_get_the_bits_of_one(form: str) -> None:
    step = layer(form)
    with threads_of_torch(2), ThreadPoolExecutor(6) as pool:
        expected = {tokens: step(tokens) for tokens in TOKENS}
        for tokens, found in pool.map(lambda tokens: (tokens, step(tokens)), TOKENS * 6):
            assert same(found, expected[tokens]), tokens


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_the_last_run_for_every_count_of_threads(form: str, dtype: torch.dtype) -> None:
    """The native kernels have the same bits for any two numbers: sums of a worker do not depend on the number
    of workers.
    """
    step = layer(form, dtype)
    found = {}
    for count in (1, 2, 4):
        with threads_of_torch(count):
            found[count] = step(150)
            assert same(step(150), found[count]), count
    if "native" in form:
        assert same(found[1], found[2]) and same(found[1], found[4])


@each_form
def test_deterministic_mode_refuses_nothing_and_changes_nothing(form: str) -> None:
    step = layer(form)
    expected = step(150)
    torch.use_deterministic_algorithms(True)  # it also fills new memory with NaN
    try:
        assert same(step(150), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_compile_at_once() -> None:
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6)
    weights = weights_for(config)
    x, logits = torch.randn(9, 8), torch.randn(9, 4)
    expected = moe_fn.moe_forward(config, weights, x, logits)
    compiled = torch.compile(moe_fn.moe_forward, fullgraph=True, backend="aot_eager")
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: compiled(config, weights, x, logits), range(8)):
            torch.testing.assert_close(y, expected)
    torch._dynamo.reset()


def in_a_fork(check: Callable[[], bool]) -> str:
    """Returns the answer of a forked child: "True", "False", the name of an error, or "hangs"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        word = b"error"
        with contextlib.suppress(BaseException):
            word = str(check()).encode()
        os.write(writer, word)
        os._exit(0)
    os.close(writer)
    start, done = time.perf_counter(), 0
    while not done and time.perf_counter() - start < 60:
        done, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    word = os.read(reader, 100).decode() if done else "hangs"
    os.close(reader)
    return word


@FORKS
@each_form
def test_a_fork_with_one_thread_computes_what_its_parent_did(form: str) -> None:
    """The child must call set_num_threads(1) if torch has used several threads in its parent: torch's products wait
    forever for lost threads.
    """
    step = layer(form)

    def check() -> bool:
        torch.set_num_threads(1)
        return same(step(150), expected)

    with threads_of_torch(2):
        expected = step(150)
        assert in_a_fork(check) == "True"
        assert same(step(150), expected)


def answer_of_a_spawned_process(form: str, answers: Any) -> None:
    answers.put([t.numpy() for t in layer(form)(17)])


def test_a_spawned_process_computes_the_same_bits() -> None:
    form = next(iter(FORMS))
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=answer_of_a_spawned_process, args=(form, answers))
    process.start()
    found = [torch.from_numpy(t) for t in answers.get()]
    process.join(timeout=60)
    assert process.exitcode == 0
    assert same(found, layer(form)(17))


RACE = """
import shutil, sys, threading, time
import torch
import moe_fn
from moe_fn.kernels.native import library as native
from moe_fn.testing import weights_for

built = []
def build(level, name, path):  # the compiler takes a minute; the library that it made takes none
    built.append(level)
    time.sleep(0.3)
    own = path.with_suffix(f".{threading.get_ident()}")
    shutil.copy(sys.argv[1], own)
    own.replace(path)

native._build = build
config = moe_fn.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6, backend="native")
weights, x, logits = weights_for(config), torch.randn(9, 8), torch.randn(9, 4)
ys = []
threads = [threading.Thread(target=lambda: ys.append(moe_fn.moe_forward(config, weights, x, logits))) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(ys) == 6 and all(torch.equal(y, ys[0]) for y in ys), len(ys)
print(len(built))
"""


@NATIVE
def test_threads_that_come_first_together_build_one_library(tmp_path: Path) -> None:
    path = native.active().path
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}  # noqa: TID251
    command = [sys.executable, "-c", RACE, str(path)]
    root = Path(moe_fn.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "1\n"  # number of builds of the library
