"""Routing replay: the choice of one run, weighed by the logits of another."""

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
    """Route to experts that another run has chosen; how much each counts comes from this run's logits, and gradients
    reach the router.

        w = s[expert_ids], s the scores of `route`; then the norm, expert_scale and routed_scaling_factor of `route`

    What reinforcement learning calls rollout routing replay (R3): an engine in another precision or on other kernels
    chooses other experts for some tokens, so the trainer takes the ids of the rollout, and its ratios compare the same
    experts. Behind it stands moe_forward_routed; logits of a gate inside the layer are what moe_route returns first.

    logits [..., num_logits], any float dtype; expert_ids [..., top_k] integers: `Routing.expert_ids`,
    `RoutingStats.expert_ids`, or those of an engine; -1, or any id that is no choice's, is no expert: weight 0, and no
    part in the norm. token_mask [...] bool, False for padding. Returns ids int64 [..., top_k], weights float32 (float64
    for float64). The correction bias, groups and the hash table have no say: they choose, and the choice is made. An
    expert outside the groups that these logits would keep weighs its score, not 0.

    Raises ValueError for shapes and dtypes that do not fit the config, and where ids do not say what the weights are:
    sparsemixer, whose two softmaxes lie around the choice of their own logits, and a capacity with renormalize, where
    dropped slots are part of the norm.

    Laws
        Routing to its own choice gives the routing.
        Routing to any choice equals the reference.

    Bit for bit, gradients too, where torch's ops route (on CPUs). Only with fill="zero" and scores of 0 or less may
    route choose outside of the kept groups, and weigh that with 0.

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
