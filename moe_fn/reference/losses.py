"""Reference balancing losses, summed term by term."""

import torch
from torch import Tensor

from moe_fn.reference.tensors import is_real, zero_of


def router_z_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Router z-loss.

        mean over tokens of log(sum_e exp(z_e))^2

    logits [..., logits] of any float dtype, token_mask [...] bool -> [] float64, 0 without tokens. Source: ST-MoE,
    arXiv 2202.08906.

    >>> router_z_loss(torch.tensor([[2.0, -torch.inf], [0.0, -torch.inf]]))
    tensor(2., dtype=torch.float64)
    """
    rows = real_rows(logits, token_mask)
    total = zero_of(logits)
    for row in rows:
        total = total + torch.logsumexp(row, dim=0) ** 2
    return total / max(len(rows), 1)


def load_balancing_loss(
    scores: Tensor, expert_ids: Tensor, num_experts: int, *, token_mask: Tensor | None = None
) -> Tensor:
    """Load-balancing loss; top_k when experts are balanced.

        E * sum_e (slots of e / T) * (mean over tokens of scores_e)

    scores [..., E] of any float dtype, expert_ids [..., top_k] ints (-1 is not counted), token_mask [...] bool -> []
    float64, 0 without tokens. Source: Switch, arXiv 2101.03961 eq. 4-6; over all slots as Mixtral in transformers.

    >>> load_balancing_loss(torch.full((2, 2), 0.5), torch.tensor([[0], [1]]), 2)
    tensor(1., dtype=torch.float64)
    """
    rows = real_rows(scores, token_mask)
    ids = real_ids(expert_ids, token_mask)
    total = zero_of(scores)
    for e in range(num_experts):
        for row in rows:
            total = total + count_of(e, ids) * row[e]
    return num_experts * total / max(len(rows), 1) ** 2


def sequence_balancing_loss(
    scores: Tensor, expert_ids: Tensor, num_experts: int, *, token_mask: Tensor | None = None
) -> Tensor:
    """Sequence-wise balancing loss; 1 when experts are balanced.

        mean over sequences of sum_e f_e P_e,  f_e = E / (k S) * slots of e, P_e = mean over tokens of scores_e /
                                               sum(scores)

    scores [B, S, E] of any float dtype, expert_ids [B, S, k] ints (-1 is not counted), token_mask [B, S] bool -> []
    float64; a sequence without tokens is 0. Source: DeepSeek-V3, arXiv 2412.19437 eq. 17-20.

    >>> sequence_balancing_loss(torch.ones(1, 2, 2), torch.tensor([[[0], [1]]]), 2)
    tensor(1., dtype=torch.float64)
    """
    sequences, top_k = scores.shape[0], expert_ids.shape[-1]
    total = zero_of(scores)
    for b in range(sequences):
        mask = None if token_mask is None else token_mask[b]
        ids = real_ids(expert_ids[b], mask)
        rows = [row / row.sum() if row.sum() != 0 else row for row in real_rows(scores[b], mask)]
        for e in range(num_experts):
            for row in rows:
                total = total + num_experts / (top_k * len(rows)) * count_of(e, ids) * row[e] / len(rows)
    return total / max(sequences, 1)


def real_rows(values: Tensor, token_mask: Tensor | None) -> list[Tensor]:
    """The rows [values.shape[-1]] of tokens that are not padding, in float64."""
    rows = values.to(torch.float64).reshape(-1, values.shape[-1]).unbind(0)
    return [row for row, real in zip(rows, is_real(token_mask, len(rows)), strict=True) if real]


def real_ids(expert_ids: Tensor, token_mask: Tensor | None) -> list[int]:
    """The ids of all slots of tokens that are not padding."""
    rows = expert_ids.reshape(-1, expert_ids.shape[-1]).tolist()
    return [
        expert_id for row, real in zip(rows, is_real(token_mask, len(rows)), strict=True) if real for expert_id in row
    ]


def count_of(expert: int, ids: list[int]) -> int:
    """The number of slots of an expert."""
    return sum(expert_id == expert for expert_id in ids)
