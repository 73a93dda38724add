"""examples/scale.py has the bytes of `moe_fn.parallel.traffic`, which compile_tests compare with the graphs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_fn import MoEConfig, ParallelConfig, RankGroup
from moe_fn.parallel import traffic


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", ["replicated", "all_gather", "all_to_all", "static", "static 2x"])
def test_bytes_are_those_of_traffic(scale: ModuleType, name: str, n: int) -> None:
    model, tokens = scale.Model(experts=16, top_k=4, hidden=64, inner=32, shared=32, layers=2), 16
    options = {"dispatch": "all_to_all_static" if name.startswith("static") else name}
    if name == "all_gather" or name.startswith("static"):
        options["max_tokens"] = tokens
    if name == "static 2x":
        options["capacity"] = scale.capacity(model, name, n, tokens)
    parallel = ParallelConfig(ep=RankGroup(name="0", size=n, rank=0), **options)
    config = MoEConfig(num_experts=16, top_k=4, hidden_size=64, intermediate_size=32, parallel=parallel)
    brought = n * tokens if name == "replicated" else tokens
    assert scale.sent(model, name, n, tokens) == pytest.approx(traffic(config, brought, torch.bfloat16).sent)


def test_balanced_experts_are_no_worse_and_even_loads_are_even(scale: ModuleType) -> None:
    model = scale.MODELS["deepseek-v3"]
    assert scale.uneven([1.0] * 256, 64, balanced=False) == pytest.approx(1)
    for n in (8, 64, 256):
        linear, balanced = (scale.unevenness(model, n, 0.6, flag) for flag in (False, True))
        assert 1 <= balanced < linear
    assert scale.ranks_of_experts(model, 2048) == 256


def test_the_tables_are_printed_and_drawn(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        sys, "argv", ["scale.py", "--gpus", "8,64", "--network", "25e9", "--plot", str(tmp_path / "scale.png")]
    )
    scale.main()
    assert (tmp_path / "scale.png").stat().st_size > 1000
