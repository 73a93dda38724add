"""Bytes that a rank sends for a layer, by formulas; tests compare them with the collectives of the compiled graphs."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from moe_fn.checks import check_int, check_kind
from moe_fn.config import MoEConfig, ParallelConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.parallel.adapters import group_of_role, summed_over
from moe_fn.parallel.dispatch import _capacity
from moe_fn.parallel.expert_ranks import WEIGHTS_OF_EACH
from moe_fn.parallel.sizes import reads_sizes
from moe_fn.quant.wire import bytes_of_row, travelling
from moe_fn.records import LoRAWeights, MoEWeights
from moe_fn.weights.check import check_config

ID_BYTES = 8  # ids and counts are int64
_MOST_TOKENS = "the most tokens"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One collective: what it sends, over which of the config's groups ("tp", "ep", "dp", "sp"), and its payload in
    bytes.
    """

    what: str
    collective: str  # "all_reduce", "all_gather", "reduce_scatter" or "all_to_all"
    group: str
    ranks: int
    payload: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank, of a payload P among n: all_gather (n-1) P, all_reduce 2 (n-1)/n P, the others
        (n-1)/n P.
        """
        others = (self.ranks - 1) * self.payload
        return {"all_gather": others, "all_reduce": 2 * others / self.ranks}.get(self.collective, others / self.ranks)


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one pass of a layer."""

    messages: tuple[Message, ...]

    @property
    def sent(self) -> float:
        """Bytes in all."""
        return sum(message.sent for message in self.messages)

    def by(self, *names: str) -> dict[tuple[str, ...], float]:
        """Bytes by fields of Message: by("collective", "group")[("all_gather", "ep")]."""
        found: dict[tuple[str, ...], float] = {}
        for message in self.messages:
            key = tuple(str(getattr(message, name)) for name in names)
            found[key] = found.get(key, 0) + message.sent
        return found


def traffic(
    config: MoEConfig, tokens: int, dtype: torch.dtype, backward: bool = False, weights: MoEWeights | None = None
) -> Traffic:
    """What this rank sends for `tokens` tokens of `dtype` in the forward pass, or with `backward` in the backward pass.

    T tokens (with sequence parallelism the rank's rows, ceil(T / sp)), n ranks of a group, K = top_k, R = T K slots; b
    bytes of dtype; w = 4 bytes of a routing weight (8 for float64); X = expert_hidden_size b, H = hidden_size b; M =
    max_tokens, else T, assumed to be the largest of all ranks; C = capacity, at most M K. Bytes are those of ring
    algorithms: all_gather (n-1) P of a payload P, all_reduce 2 (n-1)/n P, others (n-1)/n P.

        dispatch            forward                                          backward
        replicated, ep      2 (n-1)/n T X                                    2 (n-1)/n T (X + K w)
        all_gather          (n-1) M (X + K w + 8 K) + (n-1) M X              (n-1) M X + (n-1) M (X + K w)
          gather="logits"   (n-1) M (X + E b + 8) + (n-1) M X                (n-1) M X + (n-1) M (X + E b)
          no max_tokens     16 (n-1)/n more
        all_to_all          8 (n-1) + (n-1)/n R (X + 8) + (n-1)/n R X        2 (n-1)/n R X
        all_to_all_static   (n-1) C (X + 8) + (n-1) C X                      2 (n-1) C X
        tp (late)           2 (n-1)/n T H                                    2 (n-1)/n T (X + K w [+ H])
        tp (early)          2 (n-1)/n T X' [+ 2 (n-1)/n T H]                 as tp (late)
        sp                  (n-1) T H                                        (n-1) T (H + K w) + 2 (n-1)/n W

    In brackets: with sharded shared experts. X' is X without hidden_padding, W the bytes of the weights that every rank
    of sp has. Where quant.activations round the experts' inputs, rows travel to the experts (not back) as codes and
    scales, except float64 rows: the first X of a line is then smaller. Without ep, all_gather's n are the ranks of dp.
    With gather="logits", the lines of tp and sp have E b instead of K w, and router-weighted shared experts add w each.
    With several LoRA adapters, the ids of each token (all_to_all: each slot) take 8 bytes more. Sums over groups with
    `ordered` are other collectives with as many bytes. Not counted: padding of a sum to a multiple of n elements, and
    8 bytes with which ranks of sp add up the slots that a capacity drops. The line of all_to_all assumes slots spread
    evenly over the ranks; the others do not depend on the routing. `backward` counts everything that can have a
    gradient; gradients of weights that are summed (over sp, LoRA's, and the gate of sharded shared experts) are counted
    only if `weights`, this rank's, are given. Without config.parallel nothing is sent.

    >>> from moe_fn.config import ParallelConfig, RankGroup
    >>> ranks = ParallelConfig(ep=RankGroup(name="0", size=4, rank=1), dispatch="all_to_all_static", max_tokens=8)
    >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, parallel=ranks)
    >>> traffic(config, 8, torch.bfloat16).sent == 3 * 16 * (128 + 8) + 3 * 16 * 128
    True
    """
    check_config("traffic", config)
    check_int("traffic: tokens", tokens, 0)
    check_kind("traffic", "dtype", dtype, torch.dtype)
    if config.parallel is None:
        return Traffic(())
    parallel, w = config.parallel, accumulation_dtype(dtype).itemsize
    rows = -(-tokens // parallel.sp.size) if parallel.sp else tokens
    sizes = _Sizes(config=config, parallel=parallel, rows=rows, dtype=dtype, w=w)
    pieces = _MESSAGES[parallel.dispatch][backward], (_sums_backward if backward else _sums)
    found = [m for piece in pieces for m in piece(sizes)] + (
        list(_of_weights(config, parallel, weights)) if backward and weights else []
    )
    return Traffic(tuple(sent for m in found if m.payload for sent in _as_sent(parallel, m)))


def _as_sent(parallel: ParallelConfig, message: Message) -> list[Message]:
    """The collectives that carry a message.

    A sum in rank order is an all_to_all of blocks, the sum of a block on its rank, and for all_reduce an all_gather.
    """
    if not getattr(parallel, message.group).ordered or message.what == _MOST_TOKENS:
        return [message]
    exchanged = dataclasses.replace(message, collective="all_to_all")
    gathered = dataclasses.replace(message, collective="all_gather", payload=message.payload // message.ranks)
    return {"all_reduce": [exchanged, gathered], "reduce_scatter": [exchanged]}.get(message.collective, [message])


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    config: MoEConfig
    parallel: ParallelConfig
    rows: int  # T
    dtype: torch.dtype
    w: int

    @property
    def b(self) -> int:
        return self.dtype.itemsize

    @property
    def x(self) -> int:
        return self.config.expert_hidden_size * self.b

    def x_there(self, weighted: bool) -> int:
        """Bytes of a row on its way to the experts: fewer where it travels as codes."""
        codes = travelling(self.config, self.dtype, weighted)
        return self.x if codes is None else bytes_of_row(codes, self.config.expert_hidden_size)

    @property
    def routing(self) -> int:
        """Bytes of a token's routing weights, or of its logits with gather="logits"."""
        return self.config.num_logits * self.b if self.parallel.gather == "logits" else self.config.top_k * self.w

    @property
    def shared_weights(self) -> int:
        shared = self.config.shared
        return shared.count * self.w if shared is not None and shared.gate == "router" else 0

    @property
    def adapters(self) -> int:
        """How many adapter ids travel with a token or slot: none with one adapter."""
        return int(self.config.lora is not None and self.config.lora.num_adapters > 1)

    @property
    def tokens_of(self) -> str:
        return "ep" if self.parallel.ep else "dp"

    @property
    def ranks(self) -> int:
        """n, of the ranks that exchange tokens."""
        group = getattr(self.parallel, self.tokens_of)
        return 1 if group is None else int(group.size)

    @property
    def slots(self) -> int:
        """Slots that are sent with all_to_all: R, or n C in blocks of a capacity."""
        return self.ranks * _capacity(self.config) if self.parallel.row.capacity else self.rows * self.config.top_k

    @property
    def room(self) -> int:
        """M."""
        return self.parallel.max_tokens or self.rows

    def message(self, what: str, collective: str, group: str, payload: int) -> Message:
        ranks = getattr(self.parallel, group)
        return Message(what=what, collective=collective, group=group, ranks=ranks.size, payload=payload)


def _summed(s: _Sizes) -> Iterator[Message]:
    if s.parallel.ep is not None:
        yield s.message("sums", "all_reduce", "ep", s.rows * s.x)


def _summed_backward(s: _Sizes) -> Iterator[Message]:
    if s.parallel.ep is not None:
        yield s.message("of tokens", "all_reduce", "ep", s.rows * s.x)
        yield s.message("of weights", "all_reduce", "ep", s.rows * s.routing)


def _gathered(s: _Sizes) -> Iterator[Message]:
    group, logits = s.tokens_of, s.parallel.gather == "logits"
    if reads_sizes(s.parallel):
        yield s.message(_MOST_TOKENS, "all_reduce", group, ID_BYTES)
    yield s.message("tokens", "all_gather", group, s.room * s.x_there(weighted=False))
    yield s.message("logits" if logits else "weights", "all_gather", group, s.room * s.routing)
    ids = (1 if logits else s.config.top_k) + s.adapters
    yield s.message("ids", "all_gather", group, s.room * ID_BYTES * ids)
    yield s.message("sums", "reduce_scatter", group, s.ranks * s.room * s.x)


def _gathered_backward(s: _Sizes) -> Iterator[Message]:
    group = s.tokens_of
    yield s.message("of sums", "all_gather", group, s.room * s.x)
    yield s.message("of tokens", "reduce_scatter", group, s.ranks * s.room * s.x)
    yield s.message("of weights or logits", "reduce_scatter", group, s.ranks * s.room * s.routing)


def _exchanged(s: _Sizes) -> Iterator[Message]:
    if reads_sizes(s.parallel):
        yield s.message("counts", "all_to_all", "ep", s.ranks * ID_BYTES)
    yield s.message("slots", "all_to_all", "ep", s.slots * s.x_there(weighted=True))
    yield s.message("ids", "all_to_all", "ep", s.slots * ID_BYTES * (1 + s.adapters))
    yield s.message("results", "all_to_all", "ep", s.slots * s.x)


def _exchanged_backward(s: _Sizes) -> Iterator[Message]:
    yield s.message("of results", "all_to_all", "ep", s.slots * s.x)
    yield s.message("of slots", "all_to_all", "ep", s.slots * s.x)


Messages = Callable[[_Sizes], Iterator[Message]]
# By format of dispatch: messages of the forward pass and of the backward pass.
_MESSAGES: dict[str, tuple[Messages, Messages]] = {
    "replicated": (_summed, _summed_backward),
    "all_gather": (_gathered, _gathered_backward),
    "all_to_all": (_exchanged, _exchanged_backward),
    "all_to_all_static": (_exchanged, _exchanged_backward),
}


def _sums(s: _Sizes) -> Iterator[Message]:
    config, parallel = s.config, s.parallel
    hidden, sharded = s.rows * config.hidden_size * s.b, config.shared is not None and parallel.shared == "sharded"
    if parallel.sp is not None:
        yield s.message("rows", "all_gather", "sp", hidden)
    if parallel.tp is None:
        return
    if config.latent is None and (config.shared is None or sharded):
        yield s.message("routed and shared", "all_reduce", "tp", hidden)
    else:
        yield s.message("routed", "all_reduce", "tp", s.rows * config.routed_size * s.b)
        yield s.message("shared", "all_reduce", "tp", hidden if sharded else 0)


def _sums_backward(s: _Sizes) -> Iterator[Message]:
    config, parallel = s.config, s.parallel
    hidden = s.rows * config.hidden_size * s.b
    if parallel.sp is not None:
        yield s.message("of rows", "all_gather", "sp", hidden)
        yield s.message("of weights or logits", "all_gather", "sp", s.rows * s.routing)
        yield s.message("of shared weights", "all_gather", "sp", s.rows * s.shared_weights)
    if parallel.tp is not None:
        yield s.message("of tokens", "all_reduce", "tp", s.rows * s.x)
        yield s.message("of weights or logits", "all_reduce", "tp", s.rows * s.routing)
        if config.shared is not None and parallel.shared == "sharded":
            yield s.message("of tokens, shared", "all_reduce", "tp", hidden)
            yield s.message("of shared weights", "all_reduce", "tp", s.rows * s.shared_weights)


def _of_weights(config: MoEConfig, parallel: ParallelConfig, weights: MoEWeights) -> Iterator[Message]:
    """Sums of gradients of weights that all ranks of a group have and use for their own part of the layer."""
    for field in dataclasses.fields(LoRAWeights):
        t = None if weights.lora is None else getattr(weights.lora, field.name)
        if t is None:
            continue
        for role in summed_over(config, parallel, field.name):
            size, ranks = t.numel() * t.element_size(), group_of_role(parallel, role).size
            yield Message(what=f"of lora.{field.name}", collective="all_reduce", group=role, ranks=ranks, payload=size)
    if parallel.sp is not None:
        for name in WEIGHTS_OF_EACH:
            size = sum(t.numel() * t.element_size() for t in tree_leaves(getattr(weights, name)) if t is not None)
            yield Message(what=f"of {name}", collective="all_reduce", group="sp", ranks=parallel.sp.size, payload=size)
    gate = weights.shared.gate if weights.shared is not None else None
    if parallel.tp is not None and parallel.shared == "sharded" and gate is not None:
        size = gate.numel() * gate.element_size()
        yield Message(what="of shared.gate", collective="all_reduce", group="tp", ranks=parallel.tp.size, payload=size)
