"""The number of places that a change touches: a new scoring or quantization scheme is a row in the tables that
docs/contributing.md lists, and back-ends without kernels for it report it as unsupported.
"""

import ast
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from added_rows import clear_caches
from campaign.checking import share_of_bound
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from support import assert_is_the_layer
from tools import options_page

import moe_fn
from moe_fn import GroupConfig, MoEConfig, QuantConfig, RouterConfig
from moe_fn.bench.quants import expert_bytes
from moe_fn.config import ActivationConfig, ActivationQuantConfig, parallel, quant, router
from moe_fn.kernels.native import support as native
from moe_fn.kernels.options import Known, unknown_option
from moe_fn.kernels.torch import support as in_torch
from moe_fn.kernels.triton import support as triton
from moe_fn.parallel.dispatch import FORMATS
from moe_fn.parallel.traffic import _MESSAGES
from moe_fn.quant import numbers
from moe_fn.reference import quant as reference_quant
from moe_fn.reference import scores as reference_scores
from moe_fn.stages import _scores as stage_scores
from moe_fn.testing import MoEProblem, assert_matches, configs, error_bound, problems, quants, weights_for

DRAWS = settings(
    max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
# no shrinking
SEARCH = settings(DRAWS, max_examples=999, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Clears the caches after a test, so that none keeps results of an added row."""
    yield
    clear_caches()


def assert_on_its_page(where: str, name: str) -> None:
    """Checks that the test of docs/options.md fails until the name is added to its table."""
    assert any(line.startswith(f"| `{where}` |") and f"`{name}`" in line for line in options_page.table().splitlines())
    assert (
        not options_page.PAGE.exists()
        or options_page.written(options_page.PAGE.read_text()) != options_page.PAGE.read_text()
    )


def test_a_scoring_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 files; 4 more where the routers of kernels are to compute it."""
    monkeypatch.setitem(router.SCORINGS, "arctan", True)
    monkeypatch.setitem(stage_scores.SCORES, "arctan", lambda m, z: torch.atan(z) / math.pi + 0.5)
    monkeypatch.setitem(reference_scores.SCORES, "arctan", lambda z: 0.5 + torch.atan(z) / math.pi)

    assert find(configs(), lambda config: config.router.scoring == "arctan", settings=SEARCH)
    assert_on_its_page("RouterConfig.scoring", "arctan")
    config = MoEConfig(
        num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, router=RouterConfig(scoring="arctan")
    )  # type: ignore[arg-type]
    words = "RouterConfig.scoring='arctan'; the Triton kernels take 'softmax' or 'sigmoid'"
    assert str(triton.router_problem(config.json, torch.float32)).startswith(words)
    assert str(native.router_problem(config.json, torch.float32)).startswith(words.replace("Triton", "native"))
    assert native.experts_problem(config.json) is None and triton.experts_problem(config.json) is None

    fixed = {"scoring": "arctan", "groups": None, "correction_bias": "none"}  # some sums of scores nearly tie

    @DRAWS
    @given(problems(configs(**fixed)))
    def check(problem: MoEProblem) -> None:
        assert_is_the_layer(problem, problem.call(moe_fn.moe_forward))

    check()
    for back_end in INTERPRETED:  # its router leaves the scoring to torch's ops
        weights, x, logits = weights_for(config), torch.randn(3, 8), torch.randn(3, 4)
        problem = MoEProblem(config=config, weights=weights, x=x, logits=logits).with_config(backend=back_end)
        assert_is_the_layer(problem, problem.call(moe_fn.moe_forward))


# Triton's back-end, under TRITON_INTERPRET=1.
INTERPRETED = ("triton",) if triton.problem("cpu", torch.float32) is None else ()
NORMAL = (
    -1.0,
    -0.696,
    -0.525,
    -0.395,
    -0.284,
    -0.185,
    -0.091,
    0.0,
    0.08,
    0.161,
    0.246,
    0.338,
    0.441,
    0.563,
    0.723,
    1.0,
)


def test_a_quantization_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 files: one has the decoder of torch's products, one that of the reference; every other back-end needs its own
    decoder.
    """
    bounds = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(NORMAL)])
    number = numbers.Number(
        1.0,
        lambda codes, dtype: torch.tensor(NORMAL, dtype=dtype)[codes.to(torch.int32)],
        lambda values: torch.bucketize(values, bounds).to(torch.uint8),
    )
    monkeypatch.setitem(quant.ELEMENTS, "normal", quant.Element(4, torch.uint8))
    monkeypatch.setitem(quant.SCHEMES, "normal4", quant.SchemeRow("normal", "float", ("channel", "group"), None))
    monkeypatch.setitem(reference_quant.VALUES, "normal", list(NORMAL))
    one = QuantConfig(scheme="normal4", granularity="group", group_size=16)  # type: ignore[arg-type]
    assert str(in_torch.quant_problem(one.json)).startswith("quant: codes of normal; torch's products take e4m3")
    clear_caches()
    monkeypatch.setitem(numbers.NUMBERS, "normal", number)

    assert in_torch.quant_problem(one.json) is None
    assert find(quants(), lambda quant: quant.scheme == "normal4", settings=SEARCH)
    assert_on_its_page("QuantConfig.scheme", "normal4")
    known = "QuantConfig.scheme='normal4'; the {} kernels take 'fp8_e4m3' or 'int8'"
    assert str(native.quant_problem(one.json, 32, 32, "cpu")).startswith(f"quant: {known.format('native')}")
    assert str(triton.problem_on(one.json, (32, 32), "sm_90")).startswith(f"quant: {known.format('Triton')}")
    assert not triton.decodes(one.json, 32)

    @DRAWS
    @given(quants().filter(lambda quant: quant.scheme == "normal4").flatmap(_problems))
    def check(problem: MoEProblem) -> None:
        y, expected = problem.call(moe_fn.moe_forward), problem.call(moe_fn.reference.moe_forward)
        assert share_of_bound(y, expected, error_bound(problem)) <= 1

    check()
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=32, intermediate_size=32, activation="relu")
    floats = weights_for(config, bias=False)
    small, codes = moe_fn.quantize_weights(config, floats, one)
    assert moe_fn.prepare_weights(small, codes) is codes
    _, again = moe_fn.dequantize_weights(small, codes)
    assert_matches(again.gate_up, floats.gate_up, tolerance=0.16, scale=1.0)
    assert expert_bytes(small, torch.float32) == 3 * (32 * 32 // 2 + 32 * 2 * 4)


def _problems(quant: QuantConfig) -> st.SearchStrategy[MoEProblem]:
    even = st.sampled_from((2, 8, 20))
    fixed = configs(
        quant=quant, hidden_size=even, intermediate_size=even, hidden_padding=0, latent=None, weight_layout="out_in",
        backend=st.sampled_from(("auto", "torch", *INTERPRETED)), chunk_tokens=None,
    )  # fmt: skip
    return problems(fixed, tokens=st.integers(0, 7), logits="grid")


TABLES: tuple[tuple[type, Known], ...] = (
    *((MoEConfig, back_end.EXPERTS) for back_end in (native, triton)),
    *((ActivationConfig, back_end.ACTIVATION) for back_end in (native, triton)),
    *((QuantConfig, back_end.QUANT) for back_end in (native, triton)),
    *((ActivationQuantConfig, back_end.ROUNDING) for back_end in (native, triton)),
    (RouterConfig, triton.ROUTER),
    (GroupConfig, triton.GROUPS),
)


def test_tables_of_support_name_options_that_there_are() -> None:
    names = options_page.names_by_type()
    for cls, known in TABLES:
        assert set(known) <= {field.name for field in dataclasses.fields(cls)}
        for field, values in known.items():
            listed = {value for value in values or () if isinstance(value, str)}
            assert listed <= names.get(f"{cls.__name__}.{field}", set()), (cls, field)
    for where, rows in options_page.TABLES.items():
        assert set(rows) == names[where], where


def test_types_name_the_rows_of_their_tables_in_order() -> None:
    assert get_args(router.Scoring) == tuple(router.SCORINGS) == tuple(stage_scores.SCORES)
    assert tuple(router.SCORINGS) == tuple(reference_scores.SCORES)
    assert get_args(quant.Scheme) == tuple(quant.SCHEMES)
    assert get_args(quant.ActivationScheme) == tuple(quant.ACTIVATION_SCHEMES)
    assert set(quant.ELEMENTS) == set(numbers.NUMBERS) == set(reference_quant.VALUES)
    assert (None, *get_args(parallel.Dispatch)) == (None, *parallel.DISPATCHES) == tuple(FORMATS)
    assert tuple(_MESSAGES) == tuple(parallel.DISPATCHES)


@pytest.mark.parametrize(
    ("table", "option", "left", "config", "words"),
    [
        (native.ACTIVATION, "function", ("silu",), {"activation": "relu"}, "ActivationConfig.function='relu'"),
        (native.ACTIVATION, "gated", (True,), {"activation": "silu_no_mul"}, "ActivationConfig.gated=False"),
        (native.EXPERTS, "gate_up_layout", ("packed",), {"gate_up_layout": "interleaved"}, "gate_up_layout="),
        (native.EXPERTS, "weight_layout", ("out_in",), {"weight_layout": "in_out"}, "MoEConfig.weight_layout='in_out'"),
        (native.QUANT, "scheme", ("int8",), {"quant": QuantConfig(scheme="int4", granularity="channel")}, "'int4'"),
        (native.QUANT, "granularity", ("tensor",), {"quant": QuantConfig(scheme="int8", granularity="channel")},
        "QuantConfig.granularity='channel'"),
    ],
)  # fmt: skip
def test_an_option_that_the_kernels_do_not_list_runs_by_stages(
    table: dict[str, Any], option: str, left: tuple[Any, ...], config: dict[str, Any], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    layer = MoEConfig(num_experts=3, top_k=2, hidden_size=8, intermediate_size=8, **config)
    problem = MoEProblem(config=layer, weights=weights_for(layer), x=torch.randn(5, 8), logits=torch.randn(5, 3))
    clear_caches()
    monkeypatch.setitem(table, option, left)
    found = native.experts_problem(layer.json)
    if layer.quant is not None:
        found = native.quant_problem(layer.quant.json, 8, 8, "cpu")
    assert found is not None and words in found and "; the native kernels take " in found
    assert_is_the_layer(problem, problem.call(moe_fn.moe_forward))
    if moe_fn.backends()[1].available:
        with pytest.raises(ValueError, match=r"MoEConfig\.recompute=True with"):  # by the op alone
            problem.with_config(recompute=True, backend="native").call(moe_fn.moe_forward)


def test_a_field_that_no_table_lists_must_have_its_default() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(ActivationConfig):
        dropout: float = 0.0

    assert unknown_option("they", Later(), native.ACTIVATION) is None
    assert unknown_option("they", Later(dropout=0.5), native.ACTIVATION) == "Later.dropout=0.5; they take 0.0"


PACKAGE = Path(moe_fn.__file__).parent
SCORING = {"config/router.py", "stages/_scores.py", "reference/scores.py"}
SCORING_IN_KERNELS = {
    "kernels/options.py", "kernels/native/sources/router.h", "kernels/native/sources/router.cpp",
    "kernels/triton/top_k.py",
}  # fmt: skip
SCHEME = {
    "config/quant.py", "kernels/native/support.py", "kernels/native/sources/quant_arguments.h",
    "kernels/triton/support.py",
}  # fmt: skip
NUMBERS = {"config/quant.py", "quant/numbers.py", "reference/quant.py"}
NUMBERS_IN_KERNELS = {
    *(f"kernels/native/sources/{name}" for name in ("codes.h", "decode.h", "quant_arguments.h", "quantized.cpp")),
    *(f"kernels/triton/quant/{name}.py" for name in ("codes", "products", "up")),
}
DISPATCH = {"config/parallel.py", "parallel/dispatch.py", "parallel/traffic.py", "layer/compose.py"}


def files_that_name(word: str) -> set[str]:
    """Returns the files of the package whose code contains a name, without families, checkpoints and bench."""
    found = set()
    for path in PACKAGE.rglob("*"):
        file = path.relative_to(PACKAGE).as_posix()
        if path.suffix in (".py", ".h", ".cpp") and not file.startswith(("families/", "checkpoint/", "bench/")):
            text = path.read_text()
            if path.suffix == ".py":
                docstrings = [ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(text)) if
                isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]  # fmt: skip
                text = ast.unparse(ast.parse(text))
                for docstring in filter(None, docstrings):
                    text = text.replace(ast.unparse(ast.Constant(docstring)), "").replace(docstring, "")
            if re.search(rf"\b{word}\b", text):
                found.add(file)
    return found


def test_the_page_counts_the_files() -> None:
    assert files_that_name("sqrtsoftplus") == SCORING | SCORING_IN_KERNELS
    assert files_that_name("mxfp4") == SCHEME | {"reference/quant.py"}  # inputs are rounded to it, too
    assert files_that_name("e2m1") == NUMBERS | NUMBERS_IN_KERNELS
    assert files_that_name("all_to_all_static") == DISPATCH - {"layer/compose.py"}  # whose docstring has a table
    page = PACKAGE.parent / "docs" / "contributing.md"
    if page.exists():
        numbers = {
            "a scoring function": SCORING | SCORING_IN_KERNELS,
            "a quantization scheme of known codes": SCHEME,
            "one with codes of its own": SCHEME | NUMBERS | NUMBERS_IN_KERNELS,
            "a dispatch format": DISPATCH,
        }
        for change, files in numbers.items():
            assert f"\n| {change} | {len(files)} | " in page.read_text(), (change, len(files))
