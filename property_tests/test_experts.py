"""Laws of the stage experts, on sorted rows."""

import dataclasses

import torch
from hypothesis import strategies as st
from support import law, leaves
from torch import Tensor

import moe_fn
from moe_fn import Dispatched, MoEConfig, MoEWeights
from moe_fn.testing import assert_matches, configs, weights_for

CONFIGS = configs(shared=None, latent=None, zero_experts=None, opaque=False, chunk_tokens=None)
Case = tuple[MoEConfig, list[int], int]
COUNTS = st.lists(st.integers(0, 4), min_size=9, max_size=9)
CASES = st.tuples(CONFIGS, COUNTS, st.integers(0, 2**20))


def sorted_rows(case: Case, extra: int = 0, **weights: bool) -> tuple[MoEConfig, MoEWeights, Dispatched]:
    """Draws a config, weights, and rows with a count for each expert and `extra` rows of no expert."""
    config, counts, seed = case
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(counts[: config.num_experts]).cumsum(0)
    total = int(ends[-1]) + extra
    rows = torch.randn(total, config.expert_hidden_size, generator=generator)
    order = torch.arange(total)
    d = Dispatched(rows=rows, expert_ends=ends.to(torch.int32), slot_of_row=order, row_of_slot=order)
    return config, weights_for(config, generator, **weights), d


def rows_of(d: Dispatched, expert: int) -> slice:
    ends = [0, *d.expert_ends.tolist()]
    return slice(ends[expert], ends[expert + 1])


@law(CASES)
def test_a_row_depends_on_its_own_expert_alone(case: Case) -> None:
    config, weights, d = sorted_rows(case)
    out = moe_fn.experts(config, weights, d)
    expert = case[2] % config.num_experts

    def spoiled(t: Tensor | None) -> Tensor | None:
        return (
            None
            if t is None
            else torch.where((torch.arange(len(t)) == expert).view(-1, *[1] * (t.ndim - 1)), t, torch.nan)
        )

    names = ("gate_up", "down", "gate_up_bias", "down_bias", "expert_norm")
    others = dataclasses.replace(weights, **{name: spoiled(getattr(weights, name)) for name in names})
    assert_matches(moe_fn.experts(config, others, d)[rows_of(d, expert)], out[rows_of(d, expert)], tolerance=0.0)


@law(CASES, st.integers(1, 3))
def test_rows_of_no_expert_are_never_read(case: Case, extra: int) -> None:
    config, weights, d = sorted_rows(case, extra)
    end = int(d.expert_ends[-1])
    garbage = dataclasses.replace(
        d, rows=torch.where((torch.arange(end + extra) < end).unsqueeze(1), d.rows, torch.nan).requires_grad_()
    )
    weights = torch.utils._pytree.tree_map(
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, weights
    )
    out = moe_fn.experts(config, weights, garbage)
    assert_matches(out[:end], moe_fn.experts(config, weights, d)[:end], tolerance=0.0)
    out[:end].sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves(weights, garbage.rows) if t.grad is not None)


@law(CASES)
def test_both_weight_layouts_give_the_same_numbers(case: Case) -> None:
    config, weights, d = sorted_rows(case)
    other = dataclasses.replace(config, weight_layout="in_out" if config.weight_layout == "out_in" else "out_in")
    turned = dataclasses.replace(weights, gate_up=weights.gate_up.transpose(1, 2), down=weights.down.transpose(1, 2))
    assert_matches(moe_fn.experts(other, turned, d), moe_fn.experts(config, weights, d), scale=1.0)


@law(
    st.tuples(
        configs(gate_up_layout="packed", activation=st.sampled_from(["silu", "swigluoai", "gelu"]), latent=None),
        COUNTS,
        st.integers(0, 2**20),
    )
)
def test_packed_and_interleaved_weights_give_the_same_numbers(case: Case) -> None:
    config, weights, d = sorted_rows(case)
    dim = 1 if config.weight_layout == "out_in" else 2

    def woven(t: Tensor, dim: int) -> Tensor:
        return torch.stack(t.chunk(2, dim), dim + 1).flatten(dim, dim + 1)

    assert weights.gate_up_bias is not None
    interleaved = dataclasses.replace(
        weights, gate_up=woven(weights.gate_up, dim), gate_up_bias=woven(weights.gate_up_bias, 1)
    )
    other = dataclasses.replace(config, gate_up_layout="interleaved")
    assert_matches(moe_fn.experts(other, interleaved, d), moe_fn.experts(config, weights, d), scale=1.0)


@law(CASES)
def test_zero_biases_change_nothing(case: Case) -> None:
    config, weights, d = sorted_rows(case)
    assert weights.gate_up_bias is not None and weights.down_bias is not None
    zeros = {"gate_up_bias": torch.zeros_like(weights.gate_up_bias), "down_bias": torch.zeros_like(weights.down_bias)}
    none = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
    out = moe_fn.experts(config, none, d)
    assert_matches(moe_fn.experts(config, dataclasses.replace(weights, **zeros), d), out, tolerance=0.0)
    shifted = moe_fn.experts(config, dataclasses.replace(none, down_bias=torch.ones_like(weights.down_bias)), d)
    if config.expert_norm is None:
        assert_matches(shifted, out + 1, scale=1.0)
