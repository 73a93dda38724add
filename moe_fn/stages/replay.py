"""Routing replay: expert ids of one run, with routing weights from the logits of another."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import MoEWeights, RouterWeights, Routing
from moe_fn.stages._checks import check_choice_inputs
from moe_fn.stages._routing_weights import routing_weights, without_padding
from moe_fn.stages._scores import weights_of_choice


def route_to(
    config: MoEConfig, weights: MoEWeights, logits: Tensor, expert_ids: Tensor, *, token_mask: Tensor | None = None
) -> Routing:
    """Routes to experts that another run chose, with weights from this run's logits: gradients reach the router.

        w = s[expert_ids], s the scores of `route`; then the norm, expert_scale and routed_scaling_factor of `route`

    In reinforcement learning this is rollout routing replay (R3): an engine with another precision or other kernels
    chooses different experts for some tokens, so the trainer reuses the rollout's ids, and its probability ratios
    compare the same experts. Pass the result to moe_forward_routed. For a gate inside the layer, logits are the first
    result of moe_route.

    logits [..., num_logits], any float dtype; expert_ids [..., top_k] integers from `Routing.expert_ids`,
    `RoutingStats.expert_ids` or an engine: an id out of range, such as -1, is no expert, with weight 0 and no part in
    the norm; token_mask [...] bool, False for padding. Returns ids int64 [..., top_k], weights float32 (float64 for
    float64). The correction bias, groups and the hash table are not used: they only determine the choice. An expert
    outside the groups that these logits would keep gets its score as weight, not 0.

    Raises ValueError for shapes and dtypes that do not fit the config, and where weights depend on more than the ids:
    sparsemixer, whose softmaxes depend on its own choice, and a capacity with renormalize, where dropped slots are part
    of the norm.

    Laws
        Routing to its own choice gives the routing.
        Routing to any choice equals the reference.

    The first law holds bit for bit, gradients too, where torch's ops route (on CPUs). Exception: with fill="zero" and
    scores <= 0 route may choose an expert outside the kept groups, with weight 0.

    Source: Ma et al. 2025 (arXiv 2510.11370).

    >>> import moe_fn
    >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=1, intermediate_size=1)
    >>> weights = MoEWeights(gate_up=torch.zeros(4, 2, 1), down=torch.zeros(4, 1, 1))
    >>> rollout, trainer = torch.tensor([[0.0, 1.0, 0.9, -1.0]]), torch.tensor([[1.0, 1.0, 0.0, -1.0]])
    >>> ids = moe_fn.route(config, weights, rollout).expert_ids
    >>> ids, route_to(config, weights, trainer, ids).weights
    (tensor([[1, 2]]), tensor([[0.7311, 0.2689]]))
    """
    extra = weights.router or RouterWeights()
    ids = check_choice_inputs("route_to", config, extra, logits, expert_ids, token_mask)
    ids = torch.where((ids >= 0) & (ids < config.num_choices), ids, -1)
    logits = logits if token_mask is None else torch.where(token_mask.unsqueeze(-1), logits, 0)
    _, w, shared = routing_weights(
        config, extra, logits, lambda z: (ids.clamp(min=0), weights_of_choice(config, z, ids))
    )
    routing = Routing(expert_ids=ids, weights=w, shared_weights=shared)
    return routing if token_mask is None else without_padding(routing, token_mask)
