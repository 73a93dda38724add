"""Rows of every rank in one tensor: whose, how many, and what travels with them."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from moe_fn.config import MoEConfig, RankGroup
from moe_fn.ops import collectives
from moe_fn.parallel.sizes import longest_of_ranks
from moe_fn.weights.check import check_config


def gather_tokens(config: MoEConfig, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that belong to tokens, of every rank, in the order in which all_gather has their tokens: [T, ...] -> [n
    M, ...].

    For what travels with tokens and is not the layer's: a quantized payload and its scales, ids of adapters. Any dtype;
    rows of padding are zeros. M is max_tokens, or the most that a rank has (a host sync). Gradients are summed over
    ranks, back at their tokens.
    Raises ValueError for a config without ep or dp, tensors of other lengths, and more tokens than max_tokens.
    """
    check_config("gather_tokens", config)
    group = token_group(config)
    if not tensors:
        raise ValueError("gather_tokens: no tensors; expected one at least")
    tokens = tensors[0].shape[0]
    if any(t.shape[0] != tokens for t in tensors):
        raise ValueError(f"gather_tokens: tensors of {[t.shape[0] for t in tensors]} tokens; expected as many in each")
    room = room_of_ranks(config, tokens, group, torch.zeros((), dtype=torch.int64, device=tensors[0].device))
    begun = [collectives.start_gather(_as_sent(padded(t, room)), group) for t in tensors]
    return tuple(_as_given(collectives.wait(sent), t) for sent, t in zip(begun, tensors, strict=True))


_WITH_GRADIENTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _as_sent(rows: Tensor) -> Tensor:
    """Numbers without gradients as bytes: gloo knows neither float8 nor integers of 16 bits."""
    if rows.dtype in _WITH_GRADIENTS:
        return rows
    return rows.unsqueeze(-1).contiguous().view(torch.uint8)


def _as_given(rows: Tensor, like: Tensor) -> Tensor:
    return rows if like.dtype in _WITH_GRADIENTS else rows.view(like.dtype).squeeze(-1)


def room_of_ranks(config: MoEConfig, tokens: int, group: RankGroup, like: Tensor) -> int:
    """How many rows each rank contributes: what the config says, or the most that a rank has."""
    given = config.parallel.max_tokens if config.parallel else None
    if given is None:
        given = longest_of_ranks(tokens, group, like)
        torch._check(given >= tokens)
    else:
        check_room(tokens, given)
    return given


def padded(rows: Tensor, room: int) -> Tensor:
    """Rows with zeros behind, `room` in all."""
    return torch.cat([rows, rows.new_zeros(room - rows.shape[0], *rows.shape[1:])])


def check_room(tokens: int, max_tokens: int) -> None:
    """ValueError where a rank brings more tokens than the config allows; a runtime check where their number is not
    known yet.
    """
    if guard_or_false(tokens > max_tokens):
        raise ValueError(f"ParallelConfig.max_tokens={max_tokens} with {tokens} tokens on this rank; expected no more")
    # without words: a graph that holds their lambda cannot be pickled into AOTAutograd's cache
    torch._check(tokens <= max_tokens)


def token_group(config: MoEConfig) -> RankGroup:
    """Whose tokens are gathered."""
    parallel = config.parallel
    group = None if parallel is None else parallel.ep or parallel.dp
    if group is None:
        raise ValueError("MoEConfig.parallel has neither ep nor dp; expected the ranks whose tokens are gathered")
    return group
