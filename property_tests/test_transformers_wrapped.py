"""Replaced blocks in models with hooks, adapters, offloading, shards, subclasses and options: with imitations, and with
the tools themselves where they are installed.
"""

import copy
import dataclasses
import functools
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe_fn
from moe_fn import MoEConfig, MoEWeights
from moe_fn.integrations.transformers import experts, from_block, replace_moe_blocks, restore_moe_blocks, swapped
from moe_fn.testing.matching import relative_rms
from shared_tests.hung_on_modules import OF_PARAMETERS, WAYS, hang, louder
from shared_tests.transformers_models import make_model, make_token_ids
from shared_tests.zoo import ROWS, make_block, make_input, run_block

TOLERANCE = 1e-5
IDS = make_token_ids(2)


def row_of(name: str) -> Any:
    return next(row for row in ROWS if row.name.startswith(name))


def block_of(name: str) -> tuple[Any, Tensor]:
    row = row_of(name)
    return make_block(row, 3), make_input(row, 4)


def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits
    return found


def is_read(block: nn.Module) -> bool:
    return block.forward.args[1].why_called(block) is None  # type: ignore[attr-defined]


def test_a_hook_is_called_and_without_it_the_block_is_read_again() -> None:
    block, x = block_of("qwen3_moe")
    expected, seen = block(x), []
    replace_moe_blocks(block)
    assert is_read(block)
    handles = [
        m.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__)) for m in (block.experts, block.gate)
    ]
    assert relative_rms(block(x), expected) <= TOLERANCE
    assert sorted(seen) == ["Qwen3MoeExperts", "Qwen3MoeTopKRouter"] and not is_read(block)
    for handle in handles:
        handle.remove()
    assert is_read(block)


def test_recorded_router_logits_leave_the_block_read() -> None:
    model = make_model("qwen3_moe", 1)
    replace_moe_blocks(model)
    assert len(model(IDS, output_router_logits=True).router_logits) == 2
    assert all(is_read(layer.mlp) for layer in model.model.layers)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_experts_called_by_the_models_own_code_run_as_configure_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(name)
    block, x = make_block(row, 3), make_input(row, 4)
    hang(block, "experts", "forward hook")
    quiet = dataclasses.replace(row, routing="none")
    expected, asked = run_block(quiet, block, x).y, []
    theirs = experts.moe_forward_routed
    monkeypatch.setattr(
        experts, "moe_forward_routed", lambda config, *rest: asked.append(config.chunk_tokens) or theirs(config, *rest)
    )
    assert replace_moe_blocks(block, lambda config: dataclasses.replace(config, chunk_tokens=3)).replaced
    assert relative_rms(run_block(quiet, block, x).y, expected) <= TOLERANCE and asked == [3]


def test_what_configure_changed_and_nobody_would_do_is_refused() -> None:
    for change, value in {"top_k": 1, "batch_invariant": True}.items():
        block, x = block_of("qwen3_moe")
        replace_moe_blocks(block, lambda config, of={change: value}: dataclasses.replace(config, **of))  # type: ignore[misc]
        block(x)
        hang(block, "gate", "forward hook")
        with pytest.raises(
            ValueError, match=f"configure changed {change}, but its own forward runs, because gate has hooks"
        ):
            block(x)
        with pytest.raises(ValueError, match=f"configure changed {change}"):
            replace_moe_blocks(block, lambda config, of={change: value}: dataclasses.replace(config, **of))  # type: ignore[misc]
    layer, _ = block_of("gemma4")
    with pytest.raises(ValueError, match=r"configure changed activation, .* its experts are called by the layer"):
        replace_moe_blocks(layer, lambda config: dataclasses.replace(config, activation="relu"))
    muse, x = block_of("muse_spark")
    replace_moe_blocks(muse, lambda config: dataclasses.replace(config, chunk_tokens=3))
    hang(muse, "gate", "forward hook")
    with pytest.raises(
        ValueError, match="MuseSparkExperts: experts with their own gate or norm do not support options"
    ):
        muse(x)


def test_a_batch_invariant_block_has_batch_invariant_shared_experts() -> None:
    block, x = block_of("qwen2_moe")
    assert replace_moe_blocks(block, lambda config: dataclasses.replace(config, batch_invariant=True)).replaced
    assert torch.equal(block(x)[:, :1], block(x[:, :1]))
    assert block.forward.args[1].config.shared is not None


def test_a_class_of_somebodys_own_keeps_its_forward() -> None:
    block, x = block_of("qwen3_moe")
    cls: Any = type(block)
    block.__class__ = type("Mine", (cls,), {"forward": lambda self, x: louder(cls.forward(self, x))})
    assert "it overrides forward of Qwen3MoeSparseMoeBlock" in str(replace_moe_blocks(block))
    with pytest.raises(ValueError, match="from_block: Mine: it overrides forward"):
        from_block(block)
    block.__class__ = type("Named", (cls,), {})
    assert replace_moe_blocks(block).replaced and is_read(block)
    expected = block(x)
    block.__class__ = type("Late", (cls,), {"forward": lambda self, x: louder(cls.forward(self, x))})
    assert relative_rms(block(x), louder(expected)) <= TOLERANCE
    taken, _ = block_of("qwen3_moe")
    taken.forward = lambda x: x
    assert "its forward is replaced already" in str(replace_moe_blocks(taken))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "zaya"])
def test_a_forward_of_ours_holds_its_own_module_alone(name: str) -> None:
    """Adapters copy a part of a block; the copy must contain that part only."""
    block, _ = block_of(name)
    replace_moe_blocks(block)
    forwards = {path: module.forward for path, module in block.named_modules() if "forward" in vars(module)}
    assert forwards
    for path, forward in forwards.items():
        held = [value for value in forward.args if isinstance(value, nn.Module)]
        assert held == [block.get_submodule(path)], path


def test_a_wrapper_of_a_replaced_block_is_not_named_as_left() -> None:
    model = make_model("qwen3_moe", 1)
    expected = logits(model)
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    report = replace_moe_blocks(model)
    assert len(report.replaced) == 2 and report.left == ()
    assert relative_rms(logits(model), expected) <= TOLERANCE


def test_quantized_experts_are_left() -> None:
    for name in ("qwen3_moe", "gemma4"):
        block, _ = block_of(name)
        hang(block, "experts", "coded parameters")
        report = replace_moe_blocks(block)
        assert not report.replaced and "experts has a Coded for gate_up_proj" in str(report)


@pytest.mark.parametrize("way", WAYS)
def test_from_block_refuses_what_is_not_its_parameters(way: str) -> None:
    paths = (
        ("gate", "experts", "shared_experts.up_proj") if way in OF_PARAMETERS else ("gate", "experts", "experts.act_fn")
    )
    for path in paths:
        block, x = block_of("deepseek_v3")
        hang(block, path, way)
        if way == "parametrization":
            assert relative_rms(moe_fn.moe_forward(*from_block(block), x), block(x)) <= TOLERANCE
            continue
        with pytest.raises(
            ValueError, match=f"from_block: DeepseekV3MoE: {path} .*merge adapters and remove hooks first"
        ):
            from_block(block)


def test_an_activation_that_has_no_name_is_not_taken_for_the_configs() -> None:
    block, x = block_of("deepseek_v3")
    block.experts.act_fn = nn.Mish()
    assert "'Mish'" in str(replace_moe_blocks(block))
    with pytest.raises(ValueError, match="'Mish'"):
        from_block(block)
    block.experts.act_fn = block.shared_experts.act_fn = nn.GELU(approximate="tanh")
    expected = block(x)
    assert replace_moe_blocks(block).replaced
    assert relative_rms(block(x), expected) <= TOLERANCE
    block.experts.act_fn = block.shared_experts.act_fn = nn.Mish()
    expected = type(block).forward(block, x)
    assert relative_rms(block(x), expected) <= TOLERANCE and not is_read(block)


def test_dropout_that_is_on_is_refused_where_the_experts_cannot_be_called() -> None:
    block, x = block_of("switch_transformers")
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    replace_moe_blocks(block)
    block(x)
    with pytest.raises(ValueError, match=r"experts.expert_0.dropout is active in training \(p=0.5\)"):
        block.train()(x)


# --- offloading
# ----------------------------------------------------------------------------------------------------------------------


def offload(module: Any) -> None:
    """Imitates accelerate.hooks.add_hook_to_module with an AlignDevicesHook: parameters are on the device
    only during the forward.
    """
    kept = dict(module._parameters)
    for name, tensor in kept.items():
        module._parameters[name] = None if tensor is None else nn.Parameter(tensor.to("meta"))
    module._hf_hook, module._old_forward = object(), module.forward

    def forward(module: Any, *args: Any, **by_name: Any) -> Any:
        away = dict(module._parameters)
        module._parameters.update(kept)
        try:
            return module._old_forward(*args, **by_name)
        finally:
            module._parameters.update(away)

    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gemma4", "zaya"])
@pytest.mark.parametrize("first", [True, False], ids=["offloaded first", "replaced first"])
def test_offloaded_modules_load_their_parameters(name: str, first: bool) -> None:
    row = dataclasses.replace(row_of(name), routing="none")
    block, x = make_block(row, 3), make_input(row, 4)
    expected = run_block(row, block, x).y
    steps = [
        lambda: [offload(module) for module in list(block.modules()) if module._parameters],
        lambda: replace_moe_blocks(block),
    ]
    for step in steps if first else reversed(steps):
        step()
    with torch.no_grad():
        assert relative_rms(run_block(row, block, x).y, expected) <= TOLERANCE
    ours = [m for m in block.modules() if getattr(m.__dict__.get("_old_forward"), "func", None) in swapped.OURS]
    assert ours and restore_moe_blocks(block) >= len(ours)
    with torch.no_grad():
        assert torch.equal(run_block(row, block, x).y, expected)


def test_real_offloading(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    for name in ("qwen2_moe", "gemma4"):
        for first in (True, False):
            model = make_model(name, 0)
            with torch.no_grad():
                expected = logits(model)
                if not first:
                    replace_moe_blocks(model)
                accelerate.disk_offload(model, tmp_path / f"{name}{first}", execution_device=torch.device("cpu"))
                assert not first or replace_moe_blocks(model).replaced
                assert relative_rms(logits(model), expected) <= TOLERANCE


# --- adapters and quantized modules
# --------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[dict[str, Any], ...]] = {
    "nemotron_h": ({"target_modules": ["fc1_latent_proj", "fc2_latent_proj"]}, {"target_modules": ["up_proj"]}),
    "axk1": (
        {"target_modules": ["down_proj", "gate_proj"]},
        {"target_modules": [], "target_parameters": ["gate.weight"]},
    ),
    "qwen2_moe": (
        {"target_modules": ["shared_expert_gate"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    ),
    "jetmoe": ({"target_modules": ["layer"]},),
    "gemma4": ({"target_modules": ["q_proj"], "modules_to_save": ["router"]},),
}


@pytest.mark.parametrize("name", TARGETS)
def test_real_adapters_are_seen_or_refused(name: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any, **targets: Any) -> Any:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **targets))
        generator = torch.Generator().manual_seed(5)
        for path, parameter in model.named_parameters():
            if "lora_" in path or "modules_to_save" in path:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model.eval()

    for targets in TARGETS[name]:
        model = make_model(name, 0)
        plain, expected = logits(model), logits(adapted(copy.deepcopy(model), **targets))
        assert relative_rms(plain, expected) > 1e-2
        before = adapted(copy.deepcopy(model), **targets)
        report = replace_moe_blocks(before)
        assert relative_rms(logits(before), expected) <= TOLERANCE
        assert bool(report.replaced) == (name != "jetmoe") == ("router.layer is a peft." not in str(report))
        replace_moe_blocks(model)
        after = adapted(model, **targets)
        if name == "jetmoe":
            with pytest.raises(
                ValueError, match=r"JetMoeMoE: router.layer is a peft.*Linear, where .* restore_moe_blocks"
            ):
                logits(after)
            continue
        assert relative_rms(logits(after), expected) <= TOLERANCE
        with after.disable_adapter():
            assert relative_rms(logits(after), plain) <= TOLERANCE
        if "modules_to_save" not in targets:
            assert relative_rms(logits(after.merge_and_unload()), expected) <= TOLERANCE


@pytest.mark.parametrize("amp", [False, True], ids=["", "autocast"])
def test_real_quantized_modules(amp: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def in_a_block(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and ("mixer" in path or "mlp" in path)

    for name in ("nemotron_h", "axk1"):
        for first in (True, False):
            theirs = make_model(name, 0)
            ours = copy.deepcopy(theirs)
            if not first:
                replace_moe_blocks(ours)
            for model in (theirs, ours):
                quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), in_a_block)
            assert not first or replace_moe_blocks(ours).replaced
            with torch.autocast("cpu", torch.bfloat16, enabled=amp), torch.no_grad():
                assert relative_rms(logits(ours).float(), logits(theirs).float()) <= (2e-2 if amp else TOLERANCE)


# --- shards
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank_mesh() -> Any:
    """A process group of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SHARDED = {
    "qwen2_moe": lambda module: type(module).__name__ in ("Qwen2MoeExperts", "Qwen2MoeTopKRouter"),
    "gemma4": lambda module: type(module).__name__ == "Gemma4TextExperts",
    "dbrx": lambda module: type(module).__name__ == "DbrxFFN",
}


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("first", [True, False], ids=["sharded first", "replaced first"])
def test_shards_of_a_part_of_a_block_are_gathered(first: bool, one_rank_mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for name, apart in SHARDED.items():
        model = make_model(name, 0)
        y = logits(model)
        y.square().sum().backward()
        gradients = {path: p.grad for path, p in model.named_parameters()}
        model.zero_grad()
        if not first:
            replace_moe_blocks(model)
        for module in [module for module in model.modules() if apart(module)]:
            fully_shard(module, mesh=one_rank_mesh)
        fully_shard(model, mesh=one_rank_mesh)
        assert not first or replace_moe_blocks(model).replaced
        found = logits(model)
        assert relative_rms(found, y) <= TOLERANCE
        found.square().sum().backward()
        for path, p in model.named_parameters():
            if gradients[path] is not None and gradients[path].any():
                assert relative_rms(p.grad.full_tensor(), gradients[path]) <= 1e-4, path  # type: ignore[union-attr]


class Apart(nn.Module):
    """A block with experts in a separate module, whose parameters its forward reads."""

    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6)

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"gate_up": torch.randn(4, 12, 8), "down": torch.randn(4, 8, 6)})

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return moe_fn.moe_forward(self.config, MoEWeights(**self.experts), x, logits)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_shards_that_nobody_gathers_are_refused_by_name(one_rank_mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    x, scores = torch.randn(3, 8), torch.randn(3, 4)
    block = Apart()
    expected = block(x, scores)
    fully_shard(block.experts, mesh=one_rank_mesh)
    for call in (block, torch.compile(block, backend="eager")):
        with pytest.raises(
            ValueError, match=r"moe_forward: weights.gate_up is a DTensor, .* wrap \(fully_shard\) the module whose"
        ):
            call(x, scores)
    fully_shard(whole := Apart(), mesh=one_rank_mesh)
    whole.load_state_dict(block.state_dict())
    assert relative_rms(whole(x, scores), expected) <= TOLERANCE
