"""How many bytes a rank sends for a layer: formulas, which the tests hold to the collectives of the compiled graphs."""

import dataclasses
from collections.abc import Iterator
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
    """One collective: what travels, over which of the config's groups ("tp", "ep", "dp", "sp"), and the bytes that this
    rank puts in.
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
    """What this rank sends when it brings `tokens` tokens of `dtype`; with `backward`, of the backward pass alone.

    T tokens (its rows, ceil(T / sp), with sequence parallel), n ranks of a group, K = top_k, R = T K slots; b bytes of
    dtype; w = 4 bytes of a routing weight (8 for float64); X = expert_hidden_size b, H = hidden_size b; M = max_tokens,
    else T, which is then taken for the longest; C = capacity, at most M K. A ring's bytes: all_gather (n-1) P of a
    payload P, all_reduce 2 (n-1)/n P, others (n-1)/n P.

        dispatch            forward                                          backward
        replicated, ep      2 (n-1)/n T X                                    2 (n-1)/n T (X + K w)
        all_gather          (n-1) M (X + K w + 8 K) + (n-1) M X              (n-1) M X + (n-1) M (X + K w)
          gather="logits"   (n-1) M (X + E b + 8) + (n-1) M X                (n-1) M X + (n-1) M (X + E b)
          asks for sizes    16 (n-1)/n more
        all_to_all          8 (n-1) + (n-1)/n R (X + 8) + (n-1)/n R X        2 (n-1)/n R X
        all_to_all_static   (n-1) C (X + 8) + (n-1) C X                      2 (n-1) C X
        tp (late)           2 (n-1)/n T H 2 (n-1)/n T (X + K w [+ H with sharded shared experts])
        tp (early)          2 (n-1)/n T X' [+ 2 (n-1)/n T H of shared]       the same; X' without hidden_padding
        sp                  (n-1) T H (n-1) T (H + K w) + 2 (n-1)/n of the weights that each has

    Where quant.activations round the experts' inputs, rows go there (not back) as codes and scales, but those of
    float64: the first X of a line is then fewer. Without ep, dp's ranks are all_gather's n. gather="logits" has E b for
    K w in the rows of tp and sp too, and router-weighted shared experts add w for each. Where there are several LoRA
    adapters 8 bytes more travel with the ids of each token (all_to_all: each slot). Sums of groups with `ordered` are
    other collectives of as many bytes (the padding of a sum to a multiple of n numbers is not counted, nor are the 8
    bytes with which sp's ranks add up the slots that a capacity drops). all_to_all is of slots spread evenly over the
    ranks; the others do not depend on the routing. backward is of everything that can have a gradient; `weights`, this
    rank's, are needed for those whose gradients are summed (over sp, LoRA's, and the gate of sharded shared experts),
    else these are not counted. Without `parallel` nothing is sent.

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
    pieces = (_dispatched_backward, _sums_backward) if backward else (_dispatched, _sums)
    found = [m for piece in pieces for m in piece(sizes)] + (
        list(_of_weights(config, parallel, weights)) if backward and weights else []
    )
    return Traffic(tuple(sent for m in found if m.payload for sent in _as_sent(parallel, m)))


def _as_sent(parallel: ParallelConfig, message: Message) -> list[Message]:
    """The collectives that a message is: sums in the order of the ranks are exchanged, added up by the rank of each
    block, and gathered.
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
        """Bytes of a token's weights, or of its logits where they travel in their place."""
        return self.config.num_logits * self.b if self.parallel.gather == "logits" else self.config.top_k * self.w

    @property
    def shared_weights(self) -> int:
        shared = self.config.shared
        return shared.count * self.w if shared is not None and shared.gate == "router" else 0

    @property
    def adapters(self) -> int:
        """How many ids of adapters travel with a token, or a slot: none where all have the same one."""
        return int(self.config.lora is not None and self.config.lora.num_adapters > 1)

    @property
    def tokens_of(self) -> str:
        return "ep" if self.parallel.ep else "dp"

    @property
    def room(self) -> int:
        """M."""
        return self.parallel.max_tokens or self.rows

    def message(self, what: str, collective: str, group: str, payload: int) -> Message:
        ranks = getattr(self.parallel, group)
        return Message(what=what, collective=collective, group=group, ranks=ranks.size, payload=payload)


def _dispatched(s: _Sizes) -> Iterator[Message]:
    parallel, group, k = s.parallel, s.tokens_of, s.config.top_k
    n = 1 if getattr(parallel, group) is None else getattr(parallel, group).size
    if reads_sizes(parallel) and parallel.dispatch == "all_gather":
        yield s.message(_MOST_TOKENS, "all_reduce", group, ID_BYTES)
    if parallel.dispatch == "all_gather":
        yield s.message("tokens", "all_gather", group, s.room * s.x_there(weighted=False))
        yield s.message("logits" if parallel.gather == "logits" else "weights", "all_gather", group, s.room * s.routing)
        yield s.message(
            "ids", "all_gather", group, s.room * ID_BYTES * ((1 if parallel.gather == "logits" else k) + s.adapters)
        )
        yield s.message("sums", "reduce_scatter", group, n * s.room * s.x)
    elif parallel.dispatch.startswith("all_to_all"):
        rows = n * _capacity(s.config) if parallel.dispatch.endswith("static") else s.rows * k
        if reads_sizes(parallel):
            yield s.message("counts", "all_to_all", group, n * ID_BYTES)
        yield s.message("slots", "all_to_all", group, rows * s.x_there(weighted=True))
        yield s.message("ids", "all_to_all", group, rows * ID_BYTES * (1 + s.adapters))
        yield s.message("results", "all_to_all", group, rows * s.x)
    elif parallel.ep is not None:
        yield s.message("sums", "all_reduce", "ep", s.rows * s.x)


def _dispatched_backward(s: _Sizes) -> Iterator[Message]:
    parallel, group = s.parallel, s.tokens_of
    n = 1 if getattr(parallel, group) is None else getattr(parallel, group).size
    if parallel.dispatch == "all_gather":
        yield s.message("of sums", "all_gather", group, s.room * s.x)
        yield s.message("of tokens", "reduce_scatter", group, n * s.room * s.x)
        yield s.message("of weights or logits", "reduce_scatter", group, n * s.room * s.routing)
    elif parallel.dispatch.startswith("all_to_all"):
        rows = n * _capacity(s.config) if parallel.dispatch.endswith("static") else s.rows * s.config.top_k
        yield s.message("of results", "all_to_all", group, rows * s.x)
        yield s.message("of slots", "all_to_all", group, rows * s.x)
    elif parallel.ep is not None:
        yield s.message("of tokens", "all_reduce", "ep", s.rows * s.x)
        yield s.message("of weights", "all_reduce", "ep", s.rows * s.routing)


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
    """Gradients of weights that all ranks of a group have and each uses for a part."""
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
