"""Laws of dispatch, for the routings of any router."""

import torch
from hypothesis import strategies as st
from support import law
from torch import Tensor

import moe_fn
from moe_fn import Dispatched, MoEConfig, Routing
from moe_fn.testing import configs, routings

Case = tuple[MoEConfig, Routing]
CASES = configs(weight_on="output").flatmap(lambda config: st.tuples(st.just(config), routings(config)))


def dispatched(case: Case) -> tuple[Tensor, Tensor, Dispatched]:
    """Returns (expert id of each slot, num_experts for none; x; the result of dispatch)."""
    config, routing = case
    ids = routing.expert_ids.flatten()
    expert_of_slot = torch.where((ids >= 0) & (ids < config.num_experts), ids, config.num_experts)
    x = torch.arange(routing.expert_ids.shape[0] * 2.0).view(-1, 2)
    return expert_of_slot, x, moe_fn.dispatch(config, x, routing)


@law(CASES)
def test_slot_of_row_is_a_permutation_of_the_slots(case: Case) -> None:
    expert_of_slot, x, d = dispatched(case)
    slots = torch.arange(len(expert_of_slot))
    assert torch.equal(d.slot_of_row.sort().values, slots)
    assert torch.equal(d.row_of_slot[d.slot_of_row], slots)
    assert torch.equal(d.rows, x[d.slot_of_row // case[0].top_k])


@law(CASES)
def test_the_expert_of_a_row_never_decreases(case: Case) -> None:
    expert_of_slot, _, d = dispatched(case)
    assert (expert_of_slot[d.slot_of_row].diff() >= 0).all()


@law(CASES)
def test_rows_of_one_expert_keep_token_order(case: Case) -> None:
    expert_of_slot, _, d = dispatched(case)
    same_expert = expert_of_slot[d.slot_of_row].diff() == 0
    assert (d.slot_of_row.diff()[same_expert] > 0).all()


@law(CASES)
def test_expert_ends_is_the_running_count_of_rows_per_expert(case: Case) -> None:
    expert_of_slot, _, d = dispatched(case)
    counts = [int((expert_of_slot == e).sum()) for e in range(case[0].num_experts)]
    assert d.expert_ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert d.expert_ends.dtype == torch.int32


@law(CASES)
def test_slots_of_no_expert_come_last(case: Case) -> None:
    expert_of_slot, _, d = dispatched(case)
    end = int(d.expert_ends[-1])
    assert (expert_of_slot[d.slot_of_row[:end]] < case[0].num_experts).all()
    assert (expert_of_slot[d.slot_of_row[end:]] == case[0].num_experts).all()
