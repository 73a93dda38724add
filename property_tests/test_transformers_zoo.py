"""The zoo is the oracle of the integration's tests: its blocks are what they say, all of them matter, and no family is missing."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from zoo import ROWS, TOKEN_CHOICE, BlockResult, BlockRow, make_block, make_input, run_block  # noqa: E402

ALL = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
CHOOSING = pytest.mark.parametrize("row", TOKEN_CHOICE, ids=lambda row: row.name)
# Words that a config's class reads beside its fields: older names, and an option that only `getattr` knows
EXTRA_WORDS = {("longcat_flash", "router_bias"), ("dots3_note", "pyramid_num_routed")}


@functools.cache
def ran(row: BlockRow, seed: int = 0) -> tuple[Any, torch.Tensor, BlockResult]:
    block = make_block(row, seed)
    x = make_input(row, seed + 1)
    with torch.no_grad():
        return block, x, run_block(row, block, x)


def parts_of(row: BlockRow, block: Any) -> dict[str, torch.Tensor]:
    """The block's tensors that its Mixture-of-Experts output may depend on: of a gemma4 layer, not the attention nor the dense MLP."""
    tensors = dict(itertools.chain(block.named_parameters(), block.named_buffers()))
    if row.takes == "gemma_layer":
        return {
            name: tensor for name, tensor in tensors.items() if name.startswith(("router.", "experts.", "pre_feedforward_layernorm_2."))
        }
    return tensors


@ALL
def test_a_row_builds_and_runs(row: BlockRow) -> None:
    block, x, result = ran(row)
    assert not block.training
    assert all(tensor.dtype == torch.float32 for tensor in block.state_dict().values() if tensor.is_floating_point())
    assert result.y.shape == x.shape and result.y.dtype == torch.float32
    assert result.y.isfinite().all() and result.y.std() > 1e-3
    assert torch.equal(x, make_input(row, 1)), "the input was changed in place"


@CHOOSING
def test_a_router_gives_ids_and_weights(row: BlockRow) -> None:
    _, x, result = ran(row)
    assert result.expert_ids is not None and result.weights is not None
    assert result.expert_ids.shape == result.weights.shape and len(result.expert_ids) == x[..., 0].numel()
    assert result.expert_ids.dtype == torch.int64 and result.weights.dtype == torch.float32
    assert (result.weights >= 0).all() and result.weights.isfinite().all() and (result.weights > 0).any(dim=-1).float().mean() > 0.5
    for ids in result.expert_ids:
        assert ids.unique().numel() == ids.numel(), "a token chose an expert twice"
    assert result.expert_ids.unique().numel() >= 4, "too few experts are used for a test to mean much"


@ALL
def test_a_seed_decides_every_number(row: BlockRow) -> None:
    block, x, result = ran(row)
    torch.manual_seed(99)
    again = make_block(row, 0)
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(run_block(row, again, x).y, result.y)
        other = make_block(row, 1)
        assert not torch.equal(run_block(row, other, x).y, result.y)
    for (name, a), b in zip(block.state_dict().items(), other.state_dict().values(), strict=True):
        assert not torch.equal(a, b), f"{name} is the same whatever the seed"


@CHOOSING
def test_every_tensor_of_a_block_matters(row: BlockRow) -> None:
    block, x, result = ran(row)
    block = copy.deepcopy(block)
    for name, tensor in parts_of(row, block).items():
        if row.idle and name.startswith(row.idle):
            continue
        before = tensor.clone()
        with torch.no_grad():
            tensor.copy_(before.flip(-1) if not tensor.is_floating_point() else before + 0.5 * torch.randn(before.shape).to(before))
            assert not torch.equal(run_block(row, block, x).y, result.y), f"{name} does not matter"
            tensor.copy_(before)
