"""Laws of the integration with transformers: tiny, random blocks of transformers (`zoo`) are the oracle."""

import copy
import dataclasses
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import strategies as st
from support import law
from torch import Tensor, nn

import moe_fn
from moe_fn.integrations.transformers import from_block, replace_moe_blocks, restore_moe_blocks
from moe_fn.testing.matching import relative_rms
from shared_tests.hung_on_modules import OF_PARAMETERS, WAYS, hang, names_of
from shared_tests.zoo import ROWS, BlockResult, BlockRow, make_block, make_input, run_block

# Not token-choice mixtures of feed-forward experts; and nllb_moe, whose routing in transformers is not as documented.
REFUSED = ("jetmoe-attention", "nllb_moe-capacity", "doge-not-normalised", "doge-normalised", "vitpose_backbone-heads")
TWO_BANKS = tuple(
    row for row in ROWS if row.takes == "modality" or (row.block == "Ernie4_5_VLMoeMoeBlock" and not row.path)
)
KNOWN = tuple(row for row in ROWS if row.name not in REFUSED)
WHOLE = tuple(row for row in KNOWN if row not in TWO_BANKS)
TOLERANCE = 1e-5
SEEDS = st.integers(0, 2**20)


def logits_of_block(row: BlockRow, block: Any, x: Tensor, result: BlockResult) -> Tensor | None:
    """Returns the logits of Zaya's router, a network with a state; None for other families."""
    return None if row.family != "zaya" else block.gate(x, result.router_states)[0].view(*x.shape[:2], -1)


def compared(row: BlockRow, seed: int) -> tuple[float, bool]:
    """Returns the relative error of the layer against the block, and whether the same experts are chosen."""
    block, x = make_block(row, seed), make_input(row, seed + 1)
    with torch.no_grad():
        result = run_block(row, block, x)
        config, weights = from_block(block)
        logits = logits_of_block(row, block, x, result)
        y = moe_fn.moe_forward(config, weights, x, logits, token_ids=result.token_ids)
        routing = moe_fn.moe_route(config, weights, x, logits, token_ids=result.token_ids)[1]
    expected = result.y if result.after_norm is None else result.after_norm
    return relative_rms(y, expected), result.expert_ids is None or same_experts(
        row, routing.expert_ids.flatten(0, -2), result
    )


def same_experts(row: BlockRow, ids: Tensor, result: BlockResult) -> bool:
    theirs = result.expert_ids
    if row.family == "zaya":  # in this family the class that skips the experts is expert 0 with weight 0
        ids = torch.where(result.weights == 0, 0, ids)
    return torch.equal(ids.sort(-1).values, theirs.sort(-1).values)


@law(st.sampled_from(WHOLE), SEEDS)
def test_a_block_of_transformers_equals_its_config_and_weights(row: BlockRow, seed: int) -> None:
    error, same = compared(row, seed)
    assert error <= TOLERANCE, f"{row.name}: relative error {error:.2e}"
    assert same, f"{row.name}: other experts"


@law(st.sampled_from(KNOWN), SEEDS)
def test_a_replaced_model_computes_the_same(row: BlockRow, seed: int) -> None:
    block, x = make_block(row, seed), make_input(row, seed + 1)
    with torch.no_grad():
        expected = run_block(row, block, x)
        report = replace_moe_blocks(block)
        replaced = run_block(dataclasses.replace(row, routing="none"), block, x)
    assert report.replaced
    assert relative_rms(replaced.y, expected.y) <= TOLERANCE, row.name


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row.name)
def test_every_row_equals_its_config_and_weights(row: BlockRow) -> None:
    error, same = compared(row, 7)
    assert error <= TOLERANCE and same, f"{row.name}: relative error {error:.2e}, same experts: {same}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mixture_is_refused_with_a_reason(name: str) -> None:
    row = next(row for row in ROWS if row.name == name)
    block = make_block(row, 0)
    with pytest.raises(ValueError, match=f"from_block: {row.block}.* is not supported: .{{20,}}"):
        from_block(block)
    report = replace_moe_blocks(block)
    assert not report.replaced and report.left


def test_two_banks_are_named_and_their_banks_replaced() -> None:
    block = make_block(TWO_BANKS[0], 0)
    with pytest.raises(ValueError, match="use its text_moe and its vision_moe"):
        from_block(block)
    report = replace_moe_blocks(block)
    assert [r.name for r in report.replaced] == ["text_moe", "vision_moe"] and len(report.left) == 1


def test_a_module_of_no_family_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Linear is not the block of a known family; expected one of .*MixtralSparseMoeBlock"
    ):
        from_block(nn.Linear(2, 2))


ONE_OF_A_KIND = tuple({row.block: row for row in KNOWN}.values())


@pytest.mark.parametrize("row", ONE_OF_A_KIND, ids=lambda row: row.name)
def test_gradients_of_a_replaced_block_are_its_own(row: BlockRow) -> None:
    block, x = make_block(row, 3), make_input(row, 4)
    quiet = dataclasses.replace(row, routing="none")
    wanted = gradients(quiet, block, x)
    replace_moe_blocks(block)
    found = gradients(quiet, block, x)
    for name, expected in wanted.items():
        scale = max(expected.abs().max().item(), 1e-2)
        assert (found[name] - expected).abs().max().item() <= 2e-4 * scale, f"{row.name}: gradient of {name}"


@law(st.sampled_from(ONE_OF_A_KIND), st.integers(0, 2**20), st.sampled_from(sorted(WAYS)), st.booleans())
def test_hooks_and_adapters_below_a_replaced_block_take_effect_or_are_refused_by_name(
    row: BlockRow, n: int, way: str, first: bool
) -> None:
    """Values and gradients are those of the original block with the same hook or adapter on the same module; it is an
    error only if the block was replaced before.
    """
    quiet, x = dataclasses.replace(row, routing="none"), make_input(row, 4)
    theirs = make_block(row, 3)
    read = ("router.", "experts.", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")  # of a Gemma-4 layer
    paths = [
        name
        for name, _ in theirs.named_modules()
        if name and (row.takes != "gemma_layer" or f"{name}.".startswith(read))
    ]
    paths = [name for name in paths if way not in OF_PARAMETERS or names_of(theirs.get_submodule(name))]
    path, ours = paths[n % len(paths)], copy.deepcopy(theirs)
    names = (path, type(ours.get_submodule(path)).__name__, *names_of(ours.get_submodule(path)))
    hang(theirs, path, way)
    try:
        expected = with_gradient(quiet, theirs, x)
    except (AttributeError, RuntimeError):  # their own code does not support it
        return
    try:
        if first:
            hang(ours, path, way)
        replace_moe_blocks(ours)
        if not first:
            hang(ours, path, way)
        found = with_gradient(quiet, ours, x)
    except ValueError as error:
        assert not first and any(name in str(error) for name in names), f"{row.name}, {path}, {way}: {error}"
        return
    for got, wanted, tolerance in zip(found, expected, (TOLERANCE, 1e-4), strict=True):
        assert relative_rms(got, wanted) <= tolerance, f"{row.name}, {path}, {way}"


def with_gradient(row: BlockRow, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = run_block(row, block, x).y
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), gradient


def gradients(row: BlockRow, block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of x and of every parameter that the block reads, for a loss with distinct weights."""
    x = x.clone().requires_grad_()
    parameters = {name: p.requires_grad_() for name, p in block.named_parameters() if p.is_floating_point()}
    y = run_block(row, block, x).y
    weight = torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    found = torch.autograd.grad((y * weight).sum(), [x, *parameters.values()], allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(["x", *parameters], found, strict=True)}


def test_replacing_keeps_the_state_and_restoring_undoes_it() -> None:
    row = next(row for row in ROWS if row.name == "deepseek_v3-groups-scaled")
    block, x = make_block(row, 0), make_input(row, 1)
    before, expected = dict(block.state_dict(keep_vars=True)), block(x)
    replace_moe_blocks(block)
    after = block.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    other = make_block(row, 5)
    block.load_state_dict(other.state_dict())
    assert relative_rms(block(x), other(x)) <= TOLERANCE
    assert restore_moe_blocks(block) == 3
    assert torch.equal(block(x), other(x)) and not torch.equal(block(x), expected)


def test_noise_of_training_is_refused() -> None:
    for name, words in (("mixtral-plain", "noise in training"), ("phimoe-plain", "samples its experts in training")):
        row = next(row for row in ROWS if row.name == name)
        block = make_block(dataclasses.replace(row, options={**row.options, "router_jitter_noise": 0.1}), 0)
        replace_moe_blocks(block)
        block(make_input(row, 1))
        with pytest.raises(ValueError, match=words):
            block.train()(make_input(row, 1))
