"""Gathers token tensors of all ranks of ep or dp into one, padded to the same number of tokens per rank."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from moe_fn.config import MoEConfig, RankGroup
from moe_fn.ops import collectives
from moe_fn.parallel.sizes import longest_of_ranks
from moe_fn.weights.check import check_config


def gather_tokens(config: MoEConfig, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gathers per-token tensors of all ranks, in the order of tokens of dispatch "all_gather": [T, ...] -> [n M, ...].

    For data that belongs to tokens and is not an input of the layer, such as a quantized payload and its scales. Any
    dtype; rows of padding are zeros. M is max_tokens, or the largest number of tokens of a rank (a host sync).
    Gradients are summed over ranks and returned to the rank of their token.

    Raises ValueError for a config without ep or dp, tensors of other lengths, and more tokens than max_tokens.
    """
    check_config("gather_tokens", config)
    group = token_group(config)
    if not tensors:
        raise ValueError("gather_tokens: no tensors; expected at least one")
    tokens = tensors[0].shape[0]
    if any(t.shape[0] != tokens for t in tensors):
        raise ValueError(f"gather_tokens: tensors of {[t.shape[0] for t in tensors]} tokens; expected equal numbers")
    room = room_of_ranks(config, tokens, group, torch.zeros((), dtype=torch.int64, device=tensors[0].device))
    begun = [collectives.start_gather(_as_sent(padded(t, room)), group) for t in tensors]
    return tuple(_as_given(collectives.wait(sent), t) for sent, t in zip(begun, tensors, strict=True))


_WITH_GRADIENTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _as_sent(rows: Tensor) -> Tensor:
    """Tensors without gradients as bytes: gloo supports neither float8 nor 16-bit integers."""
    if rows.dtype in _WITH_GRADIENTS:
        return rows
    return rows.unsqueeze(-1).contiguous().view(torch.uint8)


def _as_given(rows: Tensor, like: Tensor) -> Tensor:
    return rows if like.dtype in _WITH_GRADIENTS else rows.view(like.dtype).squeeze(-1)


def room_of_ranks(config: MoEConfig, tokens: int, group: RankGroup, like: Tensor) -> int:
    """How many rows each rank contributes: the config's max_tokens, or the largest number of tokens of a rank."""
    given = config.parallel.max_tokens if config.parallel else None
    if given is None:
        given = longest_of_ranks(tokens, group, like)
        torch._check(given >= tokens)
    else:
        check_room(tokens, given)
    return given


def padded(rows: Tensor, room: int) -> Tensor:
    """Rows padded with zeros at the end to `room` rows."""
    return torch.cat([rows, rows.new_zeros(room - rows.shape[0], *rows.shape[1:])])


def check_room(tokens: int, max_tokens: int) -> None:
    """Raises ValueError for more tokens than max_tokens; a runtime check where the number of tokens is unbacked."""
    if guard_or_false(tokens > max_tokens):
        raise ValueError(f"ParallelConfig.max_tokens={max_tokens} with {tokens} tokens on this rank; expected no more")
    # no message: a graph that holds its lambda cannot be pickled into AOTAutograd's cache
    torch._check(tokens <= max_tokens)


def token_group(config: MoEConfig) -> RankGroup:
    """The group whose tokens are gathered: ep, else dp."""
    parallel = config.parallel
    group = None if parallel is None else parallel.ep or parallel.dp
    if group is None:
        raise ValueError("MoEConfig.parallel has neither ep nor dp; expected the ranks whose tokens are gathered")
    return group
