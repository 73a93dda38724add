"""A new activation is a row in three tables, and a kernel in each back-end that is to compute it.

A back-end without a kernel for it reports the activation as unsupported, and the layer runs by its stages.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from added_rows import clear_caches
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from support import assert_is_the_layer
from torch import Tensor

import moe_fn
from moe_fn import ActivationConfig, MoEConfig, MoEWeights, Routing
from moe_fn.config import as_activation
from moe_fn.config.activation import FUNCTIONS, PRESETS, GateFunction
from moe_fn.fused.schema import packed, unpacked
from moe_fn.kernels import arguments
from moe_fn.kernels.arguments import ARGUMENTS, RoutedExpertsArguments, arguments_of, flat
from moe_fn.kernels.native import generated, library
from moe_fn.kernels.native import support as native
from moe_fn.kernels.triton import support as triton
from moe_fn.ops.arithmetic import Arithmetic
from moe_fn.records import QuantWeights
from moe_fn.reference import activation as reference
from moe_fn.stages import _activation as stage
from moe_fn.testing import MoEProblem, configs, problems, weights_for

PACKAGE = Path(moe_fn.__file__).parent
DRAWS = settings(
    max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
BACKENDS = ("torch", *(["native"] if native.problem("cpu", torch.float32) is None else []))
# The files of an activation, without parameters or with some.
FILES = {
    "config/activation.py", "stages/_activation.py", "reference/activation.py", "kernels/options.py",
    "kernels/native/sources/activation.h", "kernels/triton/activation.py",
}  # fmt: skip


@pytest.fixture
def softsign(monkeypatch: pytest.MonkeyPatch) -> Iterator[ActivationConfig]:
    """Adds an activation to the tables: g * (1 + s) / 2 with s = z / (1 + |z|), z = alpha * g."""

    def in_torch(m: Arithmetic, c: ActivationConfig, g: Tensor) -> Tensor:
        z = c.alpha * g
        return 0.5 * g * (1 + z / (1 + z.abs()))

    def in_reference(a: ActivationConfig, g: Tensor) -> Tensor:
        return 0.5 * (g + a.alpha * g**2 / (1 + (a.alpha * g).abs()))

    clear_caches()
    monkeypatch.setitem(FUNCTIONS, "softsign", ("alpha",))  # type: ignore[misc]
    monkeypatch.setitem(stage.GATE_FUNCTIONS, "softsign", in_torch)
    monkeypatch.setitem(reference.GATE_FUNCTIONS, "softsign", in_reference)
    yield ActivationConfig(function="softsign", alpha=1.5)  # type: ignore[arg-type]
    clear_caches()


def layer_of(activation: ActivationConfig, **changes: object) -> MoEConfig:
    return dataclasses.replace(
        MoEConfig(num_experts=3, top_k=2, hidden_size=8, intermediate_size=8, activation=activation), **changes
    )


def test_an_activation(softsign: ActivationConfig) -> None:
    drawn = find(
        configs(),
        lambda config: as_activation(config.activation).function == "softsign",
        settings=settings(DRAWS, max_examples=999),
    )
    assert as_activation(drawn.activation).alpha == 1.5
    assert functions_not_on_the_page() == {"softsign"}

    @DRAWS
    @given(problems(configs(activation=softsign, backend=st.sampled_from(BACKENDS))))
    def check(problem: MoEProblem) -> None:
        assert_is_the_layer(problem, problem.call(moe_fn.moe_forward))

    check()


def functions_not_on_the_page() -> set[str]:
    page = PACKAGE.parent / "docs" / "options.md"
    words = set(re.findall(r"\w+", page.read_text())) if page.exists() else {*FUNCTIONS} - {"softsign"}
    return set(FUNCTIONS) - words


def test_the_page_of_options_has_every_function() -> None:
    assert functions_not_on_the_page() == set()


def test_a_back_end_without_the_activation_says_so(softsign: ActivationConfig) -> None:
    config = layer_of(softsign)
    words = "ActivationConfig.function='softsign'; the {} kernels take 'silu' or 'gelu'"
    assert str(native.experts_problem(config.json)).startswith(words.format("native"))
    assert str(triton.experts_problem(config.json)).startswith(words.format("Triton"))
    if "native" in BACKENDS:
        weights, x = weights_for(config), torch.randn(5, 8)
        routing = Routing(expert_ids=torch.zeros(5, 2, dtype=torch.int64), weights=torch.ones(5, 2))
        with pytest.raises(ValueError, match=r"MoEConfig.recompute=True with ActivationConfig.function='softsign'"):
            moe_fn.moe_forward_routed(layer_of(softsign, recompute=True, backend="native"), weights, x, routing)
        args = flat(packed(config, weights, x, routing.expert_ids, routing.weights))
        ops = library.active().ops
        with pytest.raises(ValueError, match="activation function is softsign; expected one of silu, gelu,"):
            ops.routed_experts(*args, False)  # type: ignore[attr-defined]


def test_a_function_without_a_row_is_refused(softsign: ActivationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(reference.GATE_FUNCTIONS, "softsign")
    with pytest.raises(ValueError, match="function='softsign': the reference does not implement it"):
        reference.activate(softsign, torch.ones(2))
    monkeypatch.delitem(FUNCTIONS, "softsign")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ActivationConfig.function is 'softsign'; expected one of 'silu'"):
        ActivationConfig(function="softsign")  # type: ignore[arg-type]


def test_an_activation_with_a_parameter_is_named_in_few_files() -> None:
    """Families that use it, and values that strategies draw, are not counted. up_cap belongs to the other factor, whose
    error has its own bound.
    """
    others = ("families/", "integrations/", "testing/option_rules.py")
    for name, more in (("situ", set()), ("gate_cap", set()), ("up_cap", {"testing/bounds/activation.py"})):
        found = {
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*")
            if path.suffix in (".py", ".h", ".cpp") and re.search(rf"\b{name}\b", path.read_text())
        }
        assert {file for file in found if not file.startswith(others)} == FILES | more, name
    page = PACKAGE.parent / "docs" / "contributing.md"
    if page.exists():
        row = re.search(r"^\| an activation[^|]*\| (\d+) \|(.*)\|$", page.read_text(), re.MULTILINE)
        assert row is not None and int(row[1]) == len(FILES)


def test_every_table_has_every_function() -> None:
    assert get_args(GateFunction) == tuple(FUNCTIONS) == tuple(stage.GATE_FUNCTIONS) == tuple(reference.GATE_FUNCTIONS)
    assert {preset.function for preset in PRESETS.values()} <= set(FUNCTIONS)


def test_a_parameter_of_activations_is_an_argument_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new field of ActivationConfig is a new argument of the op in its schema, in C++ and in Triton."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(ActivationConfig):
        beta: float | None = None

    fields = arguments._fields(Later)
    assert list(fields) == [*arguments.ACTIVATION, "beta"] and fields["beta"].schema == "float?"
    monkeypatch.setattr(generated, "ACTIVATION", tuple(fields))
    monkeypatch.setattr(generated, "ARGUMENTS", ARGUMENTS | fields)
    before, after = library._fingerprint("plain"), generated.header()
    assert all(text in after for text in ("  float beta;\n", "optional<double> beta\n", ", beta\n", "number(beta)}"))
    monkeypatch.undo()
    assert library._fingerprint("plain") != before and "beta" not in generated.header()


@pytest.mark.parametrize("quantized", [False, True])
def test_arguments_of_the_op_and_their_record_are_the_same(quantized: bool) -> None:
    config = layer_of(ActivationConfig(function="situ", gate_cap=2.0, up_cap=3.0, limit=1.0, limit_at="output"))
    codes = QuantWeights(gate_up_scale=torch.ones(1), down_scale=torch.ones(2)) if quantized else None
    weights: MoEWeights = dataclasses.replace(weights_for(config), quant=codes)
    if quantized:
        config = dataclasses.replace(config, quant=moe_fn.QuantConfig(scheme="int8", granularity="channel"))
    record = packed(config, weights, torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2))
    args = flat(record)
    assert len(args) == len(ARGUMENTS) and isinstance(record, RoutedExpertsArguments)
    again = arguments_of(args)
    assert all(left is right or left == right for left, right in zip(again, record, strict=True))
    back, tensors, x, routing = unpacked(again)
    assert (back.activation, back.quant, back.top_k) == (config.activation, config.quant, 2)
    assert x is record.x and routing.weights is record.expert_weights and tensors.gate_up is weights.gate_up
    assert (tensors.quant is None) == (not quantized)
