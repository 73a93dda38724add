"""Train and serve the tiny language model of examples/tiny_lm.py with experts distributed over ranks, on CPUs.

    torchrun --nproc-per-node 4 examples/expert_parallel.py [--steps 30] [--tp 2 --ep 2] [--dispatch all_to_all]
                                                            [--compile]
    python examples/expert_parallel.py                      # one process, without sharding: the same losses

Ranks of ep have different experts and different parts of the batch; ranks of tp have slices of the same experts and the
same part. Nothing wraps the model: its layers call moe_forward_with_stats with a config that describes the other ranks,
and with the weights of this rank. With --compile the training step with all its collectives is one graph. Parameters
that all ranks have stay equal by one explicit sum of their gradients in the step (no DistributedDataParallel);
gradients of experts need no sum over ep, as they contain the tokens of all its ranks.

A rank's loss is the mean over its part, and parts are equally long: the loss of the batch is the mean over parts, so
every gradient is divided by their number. Rank 0 repeats the first steps with all weights and the whole batch: the
losses must agree.
"""

import argparse
import dataclasses
import math
import resource
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from tiny_lm import (
    BALANCE_RATE,
    BATCH,
    BETAS,
    CONTEXT,
    EXPERTS,
    WEIGHT_DECAY,
    WIDTH,
    Params,
    State,
    attention,
    learning_rate,
    make_params,
    read_text,
    split_text,
    windows,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from moe_fn import MoEConfig, MoEWeights, ParallelConfig, RankGroup, join_weights, moe_forward_with_stats, shard_weights
from moe_fn.balance import update_correction_bias
from moe_fn.config.local import ranks_of_experts
from moe_fn.parallel import check_ranks_agree

# steps to compare, and the tolerance of their losses: sums are in another order, and Adam divides by them
CHECKED, TOLERANCE = 5, 1e-4
PROMPTS = ('The "with" statement ', "An object ", "If the exception ", "The class ")


class Plan(NamedTuple):
    """The role of this rank: the layer's config, the groups whose ranks have other tokens, its part of the batch."""

    config: MoEConfig
    others: tuple[RankGroup, ...] = ()  # ranks with other tokens
    copies: tuple[RankGroup, ...] = ()  # those of them with the same experts
    parts: int = 1
    part: int = 0


def make_plan(args: argparse.Namespace, world: int) -> Plan:
    if world == 1:
        return Plan(EXPERTS)
    ep = args.ep or world // args.tp
    dp = world // (args.tp * ep)
    if dp * ep * args.tp != world or BATCH % (dp * ep):
        raise SystemExit(
            f"--tp {args.tp} --ep {ep}: expected a product that divides the {world} ranks, and a batch of {BATCH} into "
            "parts"
        )
    mesh = init_device_mesh("cpu", (dp, ep, args.tp), mesh_dim_names=("dp", "ep", "tp"))
    dispatch = args.dispatch if ep > 1 else "replicated"
    room = BATCH // (dp * ep) * CONTEXT if dispatch in ("all_gather", "all_to_all_static") else None
    parallel = ParallelConfig.from_mesh(mesh, tp="tp", ep="ep", dp="dp", dispatch=dispatch, max_tokens=room)
    copies = (parallel.dp,) if parallel.dp else ()
    others = copies + ((parallel.ep,) if parallel.ep and dispatch != "replicated" else ())
    part = 0
    for group in others:
        part = part * group.size + group.rank
    return Plan(
        dataclasses.replace(EXPERTS, parallel=parallel), others, copies, math.prod(group.size for group in others), part
    )


# Model: that of tiny_lm, with the config as an argument


def biased(weights: MoEWeights, bias: Tensor) -> MoEWeights:
    """Returns weights with the bias of the choice of experts, which has no gradient."""
    return dataclasses.replace(weights, router=dataclasses.replace(weights.router, correction_bias=bias))


def model(config: MoEConfig, params: Params, biases: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [batch, time], biases [layers, experts] -> logits [batch, time, 256], load [layers, experts] of this
    rank's tokens.
    """
    x = F.embedding(tokens, params["embed"])
    loads = []
    for layer, bias in zip(params["layers"], biases, strict=True):
        x = x + attention(layer, F.rms_norm(x, (WIDTH,), layer["attention_norm"]))
        y, stats = moe_forward_with_stats(
            config, biased(layer["feed_forward"], bias), F.rms_norm(x, (WIDTH,), layer["feed_forward_norm"])
        )
        x = x + y
        loads.append(stats.expert_load)
    return F.linear(F.rms_norm(x, (WIDTH,), params["norm"]), params["head"]), torch.stack(loads)


def loss_of_batch(params: Params, config: MoEConfig, biases: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    logits, load = model(config, params, biases, batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), load


def sharded(config: MoEConfig, params: Params) -> Params:
    """Returns this rank's parameters: its experts, and all others."""
    if config.parallel is None:
        return params
    return params | {
        "layers": [layer | {"feed_forward": shard_weights(config, layer["feed_forward"])} for layer in params["layers"]]
    }


# Training: a pure step with collectives and optimizer


def summed(tensors: Sequence[Tensor], groups: Sequence[RankGroup]) -> list[Tensor]:
    """Returns the sums of the tensors over the ranks of the groups: one collective for each group."""
    if not groups:
        return list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    for group in groups:
        flat = functional.all_reduce(flat, "sum", group.name)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def is_of_experts(params: Params) -> list[bool]:
    """Returns for each leaf whether it belongs to experts, which only some ranks have."""
    ids = {id(t) for layer in params["layers"] for t in (layer["feed_forward"].gate_up, layer["feed_forward"].down)}
    return [id(leaf) in ids for leaf in tree_leaves(params)]


def train_step(
    plan: Plan, of_experts: Sequence[bool], state: State, biases: Tensor, batch: Tensor, rate: Tensor, step: Tensor
) -> tuple[State, Tensor, Tensor, Tensor]:
    """(state, biases, this rank's part of the batch) -> (state, biases, loss of the whole batch, its load [layers,
    experts]).
    """
    by_params = torch.func.grad_and_value(loss_of_batch, has_aux=True)
    gradients, (loss, load) = by_params(state.params, plan.config, biases, batch)
    leaves, tree = tree_flatten(gradients)
    of_all = [g for g, own in zip(leaves, of_experts, strict=True) if not own]
    *of_all, loss, load = summed([*of_all, loss, load.to(loss.dtype)], plan.others)
    own = summed([g for g, own in zip(leaves, of_experts, strict=True) if own], plan.copies)
    gradients = tree_unflatten([(own if mine else of_all).pop(0) / plan.parts for mine in of_experts], tree)
    mean = tree_map(lambda m, g: m.lerp(g, 1 - BETAS[0]), state.mean, gradients)
    square = tree_map(lambda s, g: s.lerp(g * g, 1 - BETAS[1]), state.square, gradients)

    def updated(p: Tensor, m: Tensor, s: Tensor) -> Tensor:
        direction = m / (1 - BETAS[0] ** step) / ((s / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
        return p - rate * (direction + (WEIGHT_DECAY * p if p.ndim > 1 else 0))

    biases = update_correction_bias(biases, load, BALANCE_RATE)
    return State(tree_map(updated, state.params, mean, square), mean, square), biases, loss / plan.parts, load


@dataclasses.dataclass
class Run:
    """The results of training."""

    params: Params
    biases: Tensor
    losses: list[float] = dataclasses.field(default_factory=list)
    loads: list[Tensor] = dataclasses.field(default_factory=list)
    tokens_per_second: float = math.nan  # of all ranks together, without compilation and the step that counts traffic
    traffic: int = 0  # bytes that this rank sends in one step


def train(plan: Plan, params: Params, text: Tensor, args: argparse.Namespace, steps: int, compiled: bool) -> Run:
    """Trains: batches are the same on all ranks, and each rank takes its part."""
    state = State(params, tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))
    run = Run(params, torch.zeros(len(params["layers"]), EXPERTS.num_experts))
    order = torch.Generator().manual_seed(args.seed)
    eager = partial(train_step, plan, tuple(is_of_experts(params)))
    step_function = torch.compile(eager, fullgraph=True) if compiled else eager
    seconds = 0.0
    for step in range(1, steps + 1):
        batch = windows(text, torch.randint(len(text) - CONTEXT, (BATCH,), generator=order)).chunk(plan.parts)[
            plan.part
        ]
        inputs = (state, run.biases, batch, torch.tensor(learning_rate(step / args.steps)), torch.tensor(float(step)))
        if step == 1:
            with Traffic(plan) as traffic:  # counted in an eager step; the compiled one sends the same
                eager(*inputs)
            run.traffic = traffic.sent
        start = time.perf_counter()
        state, run.biases, loss, load = step_function(*inputs)
        seconds += time.perf_counter() - start if step > 1 else 0.0
        run.losses.append(loss.item())
        run.loads.append(load)
    run.params = state.params
    run.tokens_per_second = (steps - 1) * BATCH * CONTEXT / max(seconds, 1e-9)
    return run


_COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


class Traffic(TorchDispatchMode):
    """Counts the bytes that leave this rank for others, of every collective in the block."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        parallel = plan.config.parallel
        found = (parallel.tp, parallel.ep, parallel.dp) if parallel else ()
        self.groups = {group.name: group for group in found if group}
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func._opname in _COLLECTIVES:
            n = self.groups[args[-1]].size
            size = args[0].numel() * args[0].element_size()
            if func._opname == "all_reduce":
                self.sent += 2 * (n - 1) * size // n
            elif func._opname == "all_gather_into_tensor":
                self.sent += (n - 1) * size
            elif func._opname == "reduce_scatter_tensor":
                self.sent += (n - 1) * size // n
            else:  # all_to_all_single(input, received, sent, group)
                self.sent += size - size * args[2][self.groups[args[-1]].rank] // max(1, args[0].shape[0])
        return func(*args, **(kwargs or {}))


# Serving, checks, report


def generate(plan: Plan, run: Run, prompt: str, length: int, temperature: float = 0.7) -> str:
    """Returns bytes after a prompt, which differs by part. Ranks run in step, as each byte needs all experts."""
    tokens = list(prompt.rjust(24).encode())  # as long on every rank
    draws = torch.Generator().manual_seed(plan.part)  # ranks of tp draw the same
    with torch.no_grad():
        for _ in range(length):
            logits, _ = model(plan.config, run.params, run.biases, torch.tensor([tokens[-CONTEXT:]]))
            tokens.append(int(torch.multinomial((logits[0, -1] / temperature).softmax(-1), 1, generator=draws)))
    return bytes(tokens).decode(errors="replace").lstrip()


def far_from_joined(plan: Plan, run: Run, text: Tensor) -> float:
    """Returns the largest difference of logits between the sharded model and the same model with all weights."""
    if plan.config.parallel is None:
        return 0.0
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (plan.config, [layer["feed_forward"] for layer in run.params["layers"]]))
    configs = [config for config, _ in gathered]
    layers = [
        layer | {"feed_forward": join_weights(configs, [layers[number] for _, layers in gathered])}
        for number, layer in enumerate(run.params["layers"])
    ]
    tokens = text[:CONTEXT].view(1, -1).roll(7 * plan.part)
    with torch.no_grad():
        ours, _ = model(plan.config, run.params, run.biases, tokens)
        theirs, _ = model(EXPERTS, run.params | {"layers": layers}, run.biases, tokens)
    return (ours - theirs).abs().max().item()


def row_of_rank(plan: Plan, run: Run, rank: int) -> str:
    parallel = plan.config.parallel
    weights: list[MoEWeights] = [layer["feed_forward"] for layer in run.params["layers"]]
    memory = sum(t.numel() * t.element_size() for w in weights for t in (w.gate_up, w.down))
    load = torch.stack(run.loads[-10:]).mean((0, 1))  # [experts]: slots a layer, of the whole batch
    owners = torch.tensor(ranks_of_experts(plan.config, parallel)) if parallel else torch.zeros(len(load))
    mine = load[owners == (parallel.ep.rank if parallel and parallel.ep else 0)].sum() / load.sum()
    ranks = parallel.ep.size if parallel and parallel.ep else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{rank:4}{memory / 1024:>16,.0f}{peak:>14,.0f}{run.traffic / 1024:>22,.0f}{mine * ranks:>22.2f}"


def on_every_rank(text: str) -> list[str]:
    """Returns the texts of all ranks, on every rank."""
    if not dist.is_initialized():
        return [text]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)
    return found


def work(args: argparse.Namespace, rank: int, world: int) -> None:
    start = time.perf_counter()
    training, held_out = split_text(read_text())
    plan = make_plan(args, world)
    torch.manual_seed(args.seed)
    whole = make_params(moe=True)  # the same on every rank, from the seed
    whole["layers"] = whole["layers"][: 1 if args.tiny else None]
    params = sharded(plan.config, whole)
    check_ranks_agree(plan.config, biased(params["layers"][0]["feed_forward"], torch.zeros(EXPERTS.num_experts)))
    checked = min(CHECKED, args.steps)
    alone = train(Plan(EXPERTS), whole, training, args, checked, compiled=False) if rank == 0 else None
    say = print if rank == 0 else (lambda *_, **__: None)
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    how = (
        "alone" if plan.config.parallel is None else f"{plan.config.parallel.dispatch}, {plan.parts} parts of the batch"
    )
    say(f"{ranks} ({how}), {'compiling the training step ...' if args.compile else 'eager'}", flush=True)
    run = train(plan, params, training, args, args.steps, compiled=args.compile)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert not args.compile or (graphs, breaks) == (1, 0), (graphs, breaks)
    if alone is not None:
        apart = max(abs(a - b) for a, b in zip(alone.losses, run.losses, strict=False))
        say("losses, 1 process:", *(f"{loss:.5f}" for loss in alone.losses))
        say(f"losses, {ranks}:  ", *(f"{loss:.5f}" for loss in run.losses[:checked]))
        say(f"at most {apart:.1e} apart; {TOLERANCE:.0e} is allowed")
        assert apart < TOLERANCE, "sharded training should be training"
    graph = f"{graphs} graph, {breaks} breaks on each rank" if args.compile else "eager"
    say(
        f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f} in {args.steps} steps; "
        f"{run.tokens_per_second:,.0f} tokens/s in all, {graph}"
    )
    far = far_from_joined(plan, run, held_out)
    assert far < 1e-3, far
    begin = time.perf_counter()
    answer = generate(plan, run, PROMPTS[plan.part % len(PROMPTS)], args.generate)
    pace = args.generate * plan.parts / (time.perf_counter() - begin)
    rows = on_every_rank(row_of_rank(plan, run, rank))
    say(
        f"\n{'rank':4}{'experts, KiB':>16}{'peak, MiB':>14}{'sent, KiB a step':>22}{'load (1 is even)':>22}",
        *rows,
        sep="\n",
    )
    say(
        f"\nServing, {plan.parts} prompts at once: {pace:,.0f} bytes/s; logits at most {far:.0e} from those with all "
        "weights joined"
    )
    say(*dict.fromkeys(on_every_rank(f"  {answer!r}")), sep="\n")
    say(f"{time.perf_counter() - start:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", type=int, default=1, help="ranks that have slices of the same experts")
    parser.add_argument("--ep", type=int, help="ranks with different experts; default: number of ranks / tp")
    parser.add_argument(
        "--dispatch", default="all_to_all", choices=["replicated", "all_gather", "all_to_all", "all_to_all_static"]
    )
    parser.add_argument("--generate", type=int, default=40, help="bytes that each rank generates at the end")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the training step on every rank: 1 layer and 2 ranks took 113 s on 2 busy cores",
    )
    parser.add_argument("--tiny", action="store_true", help="one layer")
    args = parser.parse_args()
    torch.set_num_threads(1)  # ranks share the cores
    if not dist.is_torchelastic_launched():
        return work(args, 0, 1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        work(args, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
