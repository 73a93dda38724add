"""Routing replay in reinforcement learning: the effect of using the rollout's experts in the trainer instead of routing
again.

    python examples/replay.py [--steps 40] [--experts bfloat16|int8]

A policy of four MoE layers learns to add two digits modulo 32 by policy gradients. The rollout runs in bfloat16
(--experts int8: with experts of 8 bits as well), the trainer in float32. Their routers differ for some tokens, whose
log-probabilities are then those of other experts: the ratio of trainer to rollout, which is 1 for an unchanged policy,
deviates, and importance sampling takes this for learning. With the rollout's ids replayed (`moe_fn.route_to`), the
ratio deviates by rounding only.

Every step is measured both ways, before its update:

    routed differently   share of (token, layer) whose set of experts differs
    k3                   mean of r - 1 - log r, r = trainer's probability of the token / rollout's: an estimate of
                         KL(rollout || trainer)
    ratio                the least and the largest r
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import moe_fn
from moe_fn import MoEConfig, MoEWeights, QuantConfig, RouterConfig, RouterWeights

DIGITS, LAYERS, PROMPTS, SAMPLES = 32, 4, 128, 8
CONFIG = MoEConfig(
    num_experts=32,
    top_k=4,
    hidden_size=64,
    intermediate_size=32,
    router=RouterConfig(scoring="sigmoid", routed_scaling_factor=2.0),
)
INT8 = QuantConfig(scheme="int8", granularity="channel")
Params = dict[str, Any]


@dataclass(frozen=True)
class Mismatch:
    """The mismatch of trainer and rollout for one batch and one way of routing."""

    k3: float
    least: float
    largest: float


def new_params(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).requires_grad_()

    e, h, i = CONFIG.num_experts, CONFIG.hidden_size, CONFIG.intermediate_size
    layers = [
        MoEWeights(gate_up=normal(e, 2 * i, h), down=normal(e, h, i), router=RouterWeights(gate=normal(e, h)))
        for _ in range(LAYERS)
    ]
    return {"digits": normal(2, DIGITS, h), "layers": layers, "head": normal(DIGITS, h)}


def embedded(params: Params, prompts: Tensor) -> Tensor:
    first, second = params["digits"]
    return 4 * (first[prompts[:, 0]] + second[prompts[:, 1]])


def log_probs(params: Params, x: Tensor) -> Tensor:
    return F.log_softmax(F.rms_norm(x, x.shape[-1:]).float() @ params["head"].float().t(), -1)


@torch.no_grad()
def rollout(params: Params, prompts: Tensor, int8: bool) -> tuple[Tensor, list[Tensor]]:
    """Returns (log-probabilities [prompts, digits], ids of every layer) in the precision of the inference engine."""
    low = tree_map(lambda t: t.bfloat16(), params)
    x, ids = embedded(low, prompts), []
    for weights in low["layers"]:
        config, weights = moe_fn.quantize_weights(CONFIG, weights, INT8) if int8 else (CONFIG, weights)
        y, stats = moe_fn.moe_forward_with_stats(config, weights, F.rms_norm(x, x.shape[-1:]))
        x, ids = x + y, [*ids, stats.expert_ids]
    return log_probs(low, x), ids


def trainer(params: Params, prompts: Tensor, replayed: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Returns the same in float32, with experts routed again or replayed. Every router has gradients either way."""
    x, ids = embedded(params, prompts), []
    for layer, weights in enumerate(params["layers"]):
        seen = F.rms_norm(x, x.shape[-1:])
        logits, routing = moe_fn.moe_route(CONFIG, weights, seen)
        ids.append(routing.expert_ids)
        if replayed is not None:
            routing = moe_fn.route_to(CONFIG, weights, logits, replayed[layer])
        x = x + moe_fn.moe_forward_routed(CONFIG, weights, seen, routing)
    return log_probs(params, x), ids


def mismatch(of_trainer: Tensor, of_rollout: Tensor, actions: Tensor) -> Mismatch:
    log_ratio = (of_trainer - of_rollout).gather(-1, actions)
    ratio = log_ratio.exp()
    return Mismatch((ratio - 1 - log_ratio).mean().item(), ratio.min().item(), ratio.max().item())


def differently(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return (
        torch.stack([(a.sort(-1).values != b.sort(-1).values).any(-1).float().mean() for a, b in pairs]).mean().item()
    )


def learn(steps: int, int8: bool, replay: bool, show: int) -> list[tuple[float, float, Mismatch, Mismatch]]:
    """Trains by policy gradients with the group's mean as baseline, importance-weighted by the ratio. Returns rewards
    and mismatches of every step.
    """
    params, generator = new_params(0), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(tree_leaves(params), lr=3e-3)
    rows = []
    for step in range(steps):
        prompts = torch.randint(DIGITS, (PROMPTS, 2), generator=generator)
        of_rollout, ids = rollout(params, prompts, int8)
        actions = of_rollout.exp().multinomial(SAMPLES, replacement=True, generator=generator)
        rewards = (actions == prompts.sum(-1, keepdim=True) % DIGITS).float()
        both = {way: trainer(params, prompts, ids if way else None) for way in (False, True)}
        own_ids = both[False][1]
        rows.append(
            (
                rewards.mean().item(),
                differently(own_ids, ids),
                *(mismatch(both[w][0], of_rollout, actions) for w in (False, True)),
            )
        )
        ratio = (both[replay][0] - of_rollout).gather(-1, actions).exp()
        loss = -((rewards - rewards.mean(-1, keepdim=True)) * ratio).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if show and (step % show == 0 or step == steps - 1):
            reward, differ, own, again = rows[-1]
            cells = [f"{way.k3:.1e} | {way.least:.3f} {way.largest:.3f}" for way in (own, again)]
            print(f"| {step} | {reward:.3f} | {differ:.1%} | {' | '.join(cells)} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--experts", choices=("bfloat16", "int8"), default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)  # faster for such small layers
    start = time.perf_counter()
    print(
        f"rollout: bfloat16, experts in {options.experts}; trainer: float32; "
        f"{LAYERS} layers of {CONFIG.num_experts} experts"
    )
    print(
        "| step | reward | routed differently | k3, own choice | ratio, own choice | k3, replayed | ratio, replayed |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|")
    rows = learn(options.steps, options.experts == "int8", replay=True, show=max(1, options.steps // 6))
    own, again = (sum(row[way].k3 for row in rows) / len(rows) for way in (2, 3))
    print(f"mean k3: {own:.2e} with the trainer's own choice, {again:.2e} replayed: {own / again:.0f} times less")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
