"""register(): experts modules of transformers compute the same with moe_fn as with their own code, for sentinels and
gradients too.
"""

import copy
import importlib
import io
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward, use_experts_implementation  # noqa: E402

from moe_fn.integrations.transformers import experts, register  # noqa: E402
from moe_fn.integrations.transformers.gates import ACTIVATIONS, places_of_numbers  # noqa: E402
from moe_fn.testing import assert_matches  # noqa: E402
from shared_tests.hung_on_modules import OF_PARAMETERS, WAYS, hang  # noqa: E402
from shared_tests.transformers_experts import (  # noqa: E402
    ACTS,
    CLASSES,
    Tokens,
    gate_nearly_of_deepseek,
    module_of,
    own_class,
    randomised,
    settings_of_experts,
    tokens_of,
)
from shared_tests.transformers_models import MODELS, make_model, make_token_ids  # noqa: E402

register()

# One rounding of each dtype on both sides: transformers rounds after every step, and some of its classes compute only
# in float32.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def run(module: Any, implementation: str, given: Tokens, direction: Tensor | None = None) -> list[Tensor]:
    """Returns the output, and gradients of x, of the routing weights and of every parameter."""
    module.config._experts_implementation = implementation
    inputs = [given.x.detach().clone().requires_grad_(), given.w.detach().clone().requires_grad_()]
    y = module(inputs[0], given.ids, inputs[1])
    direction = (
        torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().view(y.shape) if direction is None else direction
    )
    wanted = [*inputs, *module.parameters()]
    found = torch.autograd.grad((y.to(torch.float64) * direction).sum(), wanted, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))]


def theirs(module: Any, given: Tokens, implementation: str = "eager") -> list[Tensor]:
    """Returns the results of their code. Slots of no expert are given as slots of expert 0 with weight 0, as
    it need not support sentinels.
    """
    real = (given.ids >= 0) & (given.ids < module.num_experts)
    out = run(
        module,
        implementation,
        Tokens(given.x, torch.where(real, given.ids, 0).to(torch.int64), torch.where(real, given.w, 0)),
    )
    out[2] = torch.where(real, out[2], 0)
    return out


def assert_equal(actual: list[Tensor], expected: list[Tensor], module: Any, scale: float = 0.1) -> None:
    names = ["y", "d x", "d weights", *(f"d {name}" for name, _ in module.named_parameters())]
    for name, got, wanted in zip(names, actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert_matches(got, wanted, tolerance=TOLERANCES, scale=scale, name=name)


@pytest.mark.parametrize("name", CLASSES)
def test_every_decorated_class_computes_what_its_own_code_does(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        module = module_of(name, dtype)
        before = set(module.__dict__)
        given = tokens_of(module, dtype=dtype, strangers=(6, 7, 1000, -1))
        given.w[given.ids == 7] = 0.0
        assert_equal(run(module, "moe_fn", given), theirs(module, given), module)
        assert set(module.__dict__) == before, "the module has a new attribute"


@pytest.mark.parametrize("name", CLASSES)
def test_low_precision_is_as_near_to_float64_as_theirs(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        module = module_of(name, dtype)
        given = tokens_of(module, dtype=dtype)
        given = Tokens(given.x, given.ids, given.w.to(torch.float32))  # routers keep float32
        double = copy.deepcopy(module).to(torch.float64)
        exact = run(double, "eager", Tokens(given.x.double(), given.ids, given.w.double()))
        for got, wanted in zip(run(module, "moe_fn", given), exact, strict=True):
            assert_matches(got, wanted, tolerance={**TOLERANCES, torch.float32: TOLERANCES[dtype]}, scale=0.1)


def test_all_classes_of_this_version_are_found_and_known() -> None:
    assert len(CLASSES) == 65
    by_stages = set()
    for name in CLASSES:
        module = module_of(name)
        known = places_of_numbers(module.has_gate, experts._gate_of(module), experts._act_of(module))
        assert known is not None, f"{name}: its gate is not in the tables"
        by_stages |= {name} if module.has_post_expert_norm else set()
    assert by_stages == {"MuseSparkExperts"}


def test_numbers_of_a_gate_are_read_from_the_module_at_every_call() -> None:
    module = module_of("GptOssExperts")
    given = tokens_of(module)
    for limit, alpha in ((0.7, 1.3), (0.2, 1.3), (3, 0.5)):
        module.limit, module.alpha = limit, alpha
        assert_equal(run(module, "moe_fn", given), run(module, "eager", given), module)


# --- classes outside transformers
# -------------------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(st.data())
def test_any_experts_module_computes_what_its_own_code_does(data: st.DataObject) -> None:
    flag = st.booleans()
    cls = own_class(
        data.draw(st.sampled_from(("default", "own", "deepseek", "nearly")), "gate"),
        data.draw(st.sampled_from(sorted(ACTS)), "act"),
        has_bias=data.draw(flag, "bias"),
        is_transposed=data.draw(flag, "transposed"),
        has_gate=data.draw(flag, "gated"),
        norm=data.draw(flag, "norm"),
    )
    sizes = {name: data.draw(st.integers(1, 12), name) for name in ("num_experts", "hidden_size", "intermediate_size")}
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)), "dtype")
    module = randomised(cls(settings_of_experts(**sizes)), dtype, seed=data.draw(st.integers(0, 99), "seed"))
    top_k = data.draw(st.integers(1, sizes["num_experts"] + 2), "top_k")
    strangers = data.draw(st.sampled_from(((), (sizes["num_experts"],), (sizes["num_experts"], 127, -1))), "strangers")
    given = tokens_of(module, data.draw(st.integers(0, 12), "tokens"), top_k, dtype, strangers=strangers)
    w = given.w.to(data.draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)), "dtype of weights"))
    exact = Tokens(given.x, given.ids, w.to(dtype))
    expected = theirs(module, exact)
    ids = given.ids.to(data.draw(st.sampled_from(INTEGERS), "dtype of ids"))
    actual = run(module, "moe_fn", Tokens(given.x, ids, w))
    assert all(t.isfinite().all() for t in actual)
    actual[2], expected[2] = actual[2].to(dtype), expected[2].to(w.dtype).to(dtype)
    assert_equal(actual, expected, module, scale=1.0)  # sums of drawn sizes may cancel


def test_only_code_that_is_known_is_taken_for_known() -> None:
    def places(gate: str, act: str) -> Any:
        module = own_class(gate, act, has_bias=False, is_transposed=False, has_gate=True, norm=False)(
            settings_of_experts()
        )
        return places_of_numbers(True, experts._gate_of(module), experts._act_of(module))

    assert places("deepseek", "silu") == ("limit", None, None, None), "comments are not code"
    assert places("nearly", "silu") is None and places("power", "silu") is None
    assert (
        places("default", "mish") is None
        and places("default", "lambda") is None
        and places("default", "partial") is None
    )
    assert all(places("default", name) == (None,) * 4 for name in ("silu", "gelu_new", "quick_gelu", "F.silu"))
    for path in ACTIVATIONS:
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name)), f"{path} is not there"


def test_a_gate_or_a_hook_of_one_module_alone_is_called() -> None:
    module = module_of("MixtralExperts")
    given, seen = tokens_of(module), []
    handle = module.act_fn.register_forward_hook(lambda act, args, out: seen.append(out.shape) or 2 * out)
    changed = run(module, "moe_fn", given)
    assert_equal(changed, run(module, "eager", given), module)
    handle.remove()
    assert len(seen) > 1
    module._apply_gate = partial(gate_nearly_of_deepseek, SimpleNamespace(limit=0.1, act_fn=F.silu))
    assert_equal(run(module, "moe_fn", given), run(module, "grouped_mm", given), module)


@pytest.mark.parametrize("way", WAYS)
def test_what_hangs_on_an_activation_counts(way: str) -> None:
    """Hooks and adapters on the activation, and on its parts, change the output and every gradient."""
    for name, path in (
        ("MixtralExperts", "act_fn"),
        ("Inkling2Experts", "act_fn"),
        ("Inkling2Experts", "act_fn.gate_softcap"),
    ):
        module = module_of(name)
        given, plain = tokens_of(module), run(module, "moe_fn", tokens_of(module))
        hang(module, path, way)
        changed = run(module, "moe_fn", given)
        assert_equal(changed, run(module, "eager", given), module)
        if way not in OF_PARAMETERS:  # an activation has none
            assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(changed, plain, strict=True)), (name, path)


def test_rows_of_no_expert_never_reach_anybody() -> None:
    flags = {"has_bias": True, "is_transposed": False, "has_gate": True, "epsilon": 0.0}
    own = [
        randomised(own_class("power", "silu", norm=norm, **flags)(settings_of_experts()), torch.float32)
        for norm in (False, True)
    ]
    for module in (
        *own,
        module_of("GptOssExperts"),
        module_of("NemotronHExperts", torch.float64),
        module_of("MuseSparkExperts"),
    ):
        given = tokens_of(module, dtype=module.down_proj.dtype, strangers=(6, 9, -1))
        # a token of other ranks only, which may have any values
        given.x[2], given.ids[2], given.w[2] = torch.nan, 6, 0.0
        y, dx, dw, *rest = run(module, "moe_fn", given)
        assert all(t.isfinite().all() for t in (y, dx, dw, *rest))
        assert not y[2].any() and not dx[2].any() and not dw[given.ids == 6].any()


def test_small_integers_need_not_hold_the_number_of_experts() -> None:
    module = module_of("MixtralExperts", torch.float64, num_local_experts=130)
    given = tokens_of(module, tokens=40, dtype=torch.float64)
    ids = given.ids.clamp(max=127)
    ids[::3, 1] = -1
    actual = run(module, "moe_fn", Tokens(given.x, ids.to(torch.int8), given.w))
    assert_equal(actual, theirs(module, Tokens(given.x, ids, given.w)), module)


def test_ranks_add_up_to_the_layer() -> None:
    for name in ("MixtralExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"):
        whole = module_of(name)
        given = tokens_of(whole, top_k=5)
        parts = []
        for rank in range(3):
            part = copy.deepcopy(whole)
            part.num_experts, part._is_expert_parallel = 2, True
            for parameter in part.parameters():
                parameter.data = parameter.data[2 * rank : 2 * rank + 2] if parameter.shape[0] == 6 else parameter.data
            elsewhere = given.ids // 2 != rank
            local = Tokens(given.x, torch.where(elsewhere, 2, given.ids % 2), given.w.masked_fill(elsewhere, 0.0))
            parts.append(run(part, "moe_fn", local)[:3])
            assert_matches(parts[-1][0], run(part, "grouped_mm", local)[0], tolerance=TOLERANCES, scale=0.1)
        wanted = run(whole, "eager", given)
        for index in (0, 1):
            assert_matches(sum(part[index] for part in parts), wanted[index], tolerance=TOLERANCES, scale=0.1)


def test_a_rank_with_nothing_to_do_runs_one_row_of_zeros() -> None:
    for name in ("MixtralExperts", "GptOssExperts", "MuseSparkExperts"):
        module = module_of(name)
        nothing = torch.zeros(0, 16, requires_grad=True)
        module.config._experts_implementation = "moe_fn"
        y = module(nothing.sum(0, keepdim=True), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))[:0]
        (y.sum() + nothing.sum()).backward()
        assert y.shape == (0, 16) and nothing.grad is not None
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())
        assert module(torch.zeros(0, 16), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)).shape == (0, 16)


def test_autocast_and_mixed_dtypes_compute_as_theirs() -> None:
    for name in ("MixtralExperts", "GptOssExperts", "MuseSparkExperts"):
        # their grouped_mm needs rows of 16 bytes
        module = module_of(name, intermediate_size=24, moe_intermediate_size=24)
        given = tokens_of(module)
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = run(module, "moe_fn", given)[0], run(module, "eager", given)[0]
        assert ours.dtype == given.x.dtype
        assert (ours - run(module, "eager", given)[0]).norm() > 1e-4 * ours.norm(), "autocast is not honoured"
        assert_matches(ours, eager, tolerance=2e-2, scale=0.1)
        low = copy.deepcopy(module).to(torch.bfloat16)
        ours, grouped = run(low, "moe_fn", given), run(low, "grouped_mm", given)
        assert ours[0].dtype == torch.float32
        assert_matches(ours[0], grouped[0], tolerance=2e-2, scale=0.1)


def test_weights_may_be_made_by_a_parametrization() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    module = module_of("MixtralExperts")
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", Doubled())
    given = tokens_of(module)
    assert_equal(run(module, "moe_fn", given), run(module, "eager", given), module)


# --- what is refused
# -----------------------------------------------------------------------------------------------------------------


def call(module: Any) -> Tensor:
    given = tokens_of(module)
    module.config._experts_implementation = "moe_fn"
    y: Tensor = module(given.x, given.ids, given.w)
    return y


def test_quantized_distributed_and_misfitting_weights_are_refused() -> None:
    module = module_of("MixtralExperts")
    whole = module.gate_up_proj.data
    module.gate_up_proj = nn.Parameter(whole.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"MixtralExperts: gate_up_proj is torch.float8_e4m3fn; expected .* not quantized"
    ):
        call(module)
    module.gate_up_proj = nn.Parameter(TwoTensor(whole, whole.clone()))
    with pytest.raises(ValueError, match="gate_up_proj is a TwoTensor; expected a plain tensor"):
        call(module)
    module.gate_up_proj = nn.Parameter(torch.cat([whole, whole]))
    with pytest.raises(ValueError, match=r"gate_up_proj is \(12, 24, 16\); expected 3 dims, the first num_experts=6"):
        call(module)
    module.gate_up_proj = nn.Parameter(whole[:, :-2])
    with pytest.raises(ValueError, match="gate_up"):
        call(module)
    module.gate_up_proj = nn.Parameter(whole[:, :, 1:])
    with pytest.raises(ValueError, match="gate_up_proj has 15 inputs and down_proj has 16 outputs"):
        call(module)
    given = tokens_of(module)
    module.gate_up_proj = nn.Parameter(whole)
    with pytest.raises(ValueError, match="hidden_states has 3 dims"):
        module(given.x.unsqueeze(0), given.ids, given.w)
    own = own_class("power", "silu", has_bias=False, is_transposed=False, has_gate=True, norm=False)(
        settings_of_experts()
    )
    own._apply_gate = lambda gate_up: gate_up
    with pytest.raises(ValueError, match="its gate returns 24 columns; expected 12"):
        call(randomised(own, torch.float32))


def test_float8_experts_say_what_is_wrong() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts

    class Quantized(FP8Experts):
        pass

    cls = use_experts_implementation(Quantized, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = cls(
        settings_of_experts(swiglu_alpha=None, mlp_gate_softcap=None, _experts_implementation="moe_fn"),
        block_size=(4, 4),
    )
    with pytest.raises(ValueError, match=r"Quantized: gate_up_proj is torch.float8_e4m3fn; expected .* not quantized"):
        module(torch.zeros(2, 16), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))


def test_names_that_transformers_has_are_refused_and_registering_twice_is_not() -> None:
    register()
    for name in ("eager", "grouped_mm", "deepgemm_megamoe", "", None):
        with pytest.raises(ValueError, match="register: "):
            register(name)  # type: ignore[arg-type]
    assert ExpertsInterface()["grouped_mm"] is grouped_mm_experts_forward
    try:
        register("another_name")
        assert ExpertsInterface()["another_name"] is ExpertsInterface()["moe_fn"] is experts.experts_forward
    finally:
        ExpertsInterface._global_mapping.pop("another_name")


def test_modules_are_as_they_were() -> None:
    module = module_of("GptOssExperts")
    given = tokens_of(module)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    expected = run(module, "moe_fn", given)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert twin.state_dict().keys() == state.keys() and all(
            torch.equal(t, state[name]) for name, t in twin.state_dict().items()
        )
        assert all(torch.equal(a, b) for a, b in zip(run(twin, "moe_fn", given), expected, strict=True))


# --- whole models
# --------------------------------------------------------------------------------------------------------------------


def of_model(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Returns logits, and the gradient of every parameter that has one."""
    y = model(ids, use_cache=False).logits
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    direction = torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    found = torch.autograd.grad((y * direction).sum(), list(wanted.values()), allow_unused=True)
    return {"logits": y.detach()} | {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.registered])
def test_whole_models_give_the_same_logits_gradients_and_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model(name, seed=0), make_token_ids(seed=1)
    keys = set(model.state_dict())
    expected, tokens = of_model(model, ids), model.generate(ids, max_new_tokens=6, do_sample=False)
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(type(args[0]).__name__)
        return experts.experts_forward(*args)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "moe_fn", counted)
    model.set_experts_implementation("moe_fn")
    actual = of_model(model, ids)
    assert calls and set(calls) <= set(CLASSES), "the experts did not run on moe_fn"
    assert actual.keys() == expected.keys() and set(model.state_dict()) == keys
    for key, wanted in expected.items():
        assert_matches(actual[key], wanted, tolerance=1e-5, scale=1e-3, name=key)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


def test_saved_models_load_onto_moe_fn(tmp_path: Path) -> None:
    model, ids = make_model("qwen3_moe", seed=0), make_token_ids(seed=1)
    expected = of_model(model, ids)["logits"]
    model.set_experts_implementation("moe_fn")
    model.save_pretrained(tmp_path)
    assert "moe_fn" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="moe_fn")
    assert loaded.config._experts_implementation == "moe_fn"
    for twin in (loaded, copy.deepcopy(model)):
        assert_matches(of_model(twin, ids)["logits"], expected, tolerance=1e-5)
