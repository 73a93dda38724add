"""Layers on several ranks, compared with one rank that has all weights: run by `test_parallel` in real processes
(gloo).
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moe_fn
from moe_fn import (
    ActivationQuantConfig,
    MoEConfig,
    MoEWeights,
    ParallelConfig,
    QuantConfig,
    RouterConfig,
    SharedExpertsConfig,
)
from moe_fn.config import LatentConfig, LoRAConfig, NormsConfig, ZeroExpertsConfig
from moe_fn.testing import assert_matches, weights_for
from ranks.layers import BASE, MORE_LAYERS, NOT_BY_LOGITS, NOT_SLICED

# with granularity "token", slices would have different scales
_OF_GROUPS = ActivationQuantConfig(scheme="int8", granularity="group", group_size=2)
_MXFP4 = QuantConfig(scheme="mxfp4", granularity="group", group_size=32)
LAYERS: dict[str, MoEConfig] = {
    "plain": BASE,
    "shared": dataclasses.replace(
        BASE, shared=SharedExpertsConfig(intermediate_size=8, gate="sigmoid", combine="average")
    ),
    "scale on the output, zero experts": dataclasses.replace(BASE, zero_experts=ZeroExpertsConfig(count=2), top_k=3),
    "latent, padding": dataclasses.replace(
        BASE, latent=LatentConfig(size=6), hidden_padding=2, shared=SharedExpertsConfig(intermediate_size=4, count=2)
    ),
    "router-weighted shared": dataclasses.replace(
        BASE,
        router=RouterConfig(scoring="sigmoid", correction_bias="scores", routed_scaling_factor=2.0, scale_on="output"),
        shared=SharedExpertsConfig(intermediate_size=4, count=2, gate="router"),
    ),
    "in_out, interleaved, weight on input": dataclasses.replace(
        BASE,
        weight_layout="in_out",
        gate_up_layout="interleaved",
        router=RouterConfig(scoring="sigmoid", weight_on="input", renormalize=False),
    ),
    "int8": dataclasses.replace(BASE, quant=QuantConfig(scheme="int8", granularity="channel", activations=_OF_GROUPS)),
    "mxfp4, weights alone": dataclasses.replace(BASE, hidden_size=64, intermediate_size=128, quant=_MXFP4),
    "norms, not gated": dataclasses.replace(
        BASE, activation="relu2_no_mul", norms=NormsConfig(epsilon=0.1, input=True, output=True), num_experts=7, top_k=5
    ),
    "lora": dataclasses.replace(BASE, lora=LoRAConfig(num_adapters=3, rank=2)),
    "lora that experts share, interleaved, weight on input": dataclasses.replace(
        BASE,
        lora=LoRAConfig(num_adapters=2, rank=3, experts="shared"),
        gate_up_layout="interleaved",
        router=RouterConfig(weight_on="input", renormalize=False),
    ),
}
ALL_LAYERS = LAYERS | MORE_LAYERS
Which = Literal["cases", "crossed", "bugs"]


@dataclass(frozen=True)
class Case:
    """A mesh (names and sizes), how the layer is distributed over it, and the numbers of tokens of ranks."""

    mesh: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(default_factory=dict)
    layer: str = "plain"
    tokens: tuple[int, ...] = (5, 0, 3, 1)

    @property
    def world(self) -> int:
        size = 1
        for _, n in self.mesh:
            size *= n
        return size

    @property
    def name(self) -> str:
        mesh = "x".join(f"{name}{n}" for name, n in self.mesh)
        return f"{mesh} {' '.join(f'{k}={v}' for k, v in self.options.items())} {self.layer}"


PAYLOADS = (
    torch.int8,
    torch.int16,
    torch.bool,
    torch.float8_e4m3fn,
)  # dtypes of payloads that are sent along with tokens
TP, EP, DP = "tp", "ep", "dp"
MESHES: tuple[tuple[tuple[str, int], ...], ...] = (
    ((EP, 1),), ((TP, 2),), ((EP, 2),), ((DP, 2),), ((TP, 4),), ((EP, 4),), ((EP, 2), (TP, 2)), ((DP, 2), (EP, 2)),
    ((DP, 2), (TP, 2)),
)  # fmt: skip


def formats(mesh: tuple[tuple[str, int], ...]) -> Iterator[dict[str, Any]]:
    """Yields every format that fits a mesh."""
    names = {name for name, n in mesh if n > 1}
    yield {"dispatch": "replicated"}
    if EP in names:
        yield {"dispatch": "all_gather"}
        yield {"dispatch": "all_gather", "gather": "logits", "max_tokens": 6, "placement": "round_robin"}
        yield {"dispatch": "all_to_all"}
        yield {"dispatch": "all_to_all_static", "max_tokens": 5}
    elif DP in names:
        yield {"dispatch": "all_gather"}
    if TP in names:
        yield {"sequence_parallel": True, "dispatch": "all_to_all"}
        yield {"sequence_parallel": True, "dispatch": "all_gather"}
        yield {"sequence_parallel": True, "dispatch": "all_to_all_static", "max_tokens": 3}


def cases(world: int, crossed: bool = False) -> list[Case]:
    """Returns every format on every mesh, with layers in turn, and every layer on the meshes with most dimensions.

    crossed: every layer in every format, not in one.
    """
    layers = itertools.cycle(LAYERS)
    found = [Case(mesh, options, next(layers)) for mesh in MESHES for options in formats(mesh)]
    for mesh in (((EP, 2), (TP, 2)), ((TP, 2),)):
        pairs = itertools.product(LAYERS, formats(mesh)) if crossed else zip(LAYERS, itertools.cycle(formats(mesh)))
        found += [Case(mesh, options, layer) for layer, options in pairs]
    found += [Case(((EP, 4),), {"dispatch": "all_to_all", "placement": (3, 0, 0, 1, 2, 3)}, "plain")]
    copies = ("replicated", "all_gather", "all_to_all")
    found += [Case(((EP, n),), {"dispatch": dispatch, "num_physical": 8}) for n in (2, 4) for dispatch in copies]
    found += [Case(((EP, 2),), {"dispatch": "all_to_all", "num_physical": 8}, "lora")]
    static = {"dispatch": "all_to_all_static", "max_tokens": 5}
    for layer in (
        "plain",
        "lora",
        "in_out, interleaved, weight on input",
        "router-weighted shared",
        "scale on the output, zero experts",
    ):
        found += [Case(((EP, 2),), static | {"capacity": capacity}, layer) for capacity in (1, 2)]
    found += [Case(mesh, static | {"capacity": 3}) for mesh in (((EP, 2),), ((DP, 2), (EP, 2)))]
    found += [Case(((TP, 2),), {"sequence_parallel": True} | static | {"capacity": 1})]
    found += [Case(((TP, 2),), {"dispatch": "replicated", "shared": "replicated"}, "shared")]
    ordered = [
        (((TP, 4),), "replicated"),
        (((EP, 4),), "replicated"),
        (((EP, 4),), "all_gather"),
        (((DP, 2), (TP, 2)), "all_gather"),
    ]
    found += [Case(mesh, {"dispatch": dispatch, "ordered_sums": True}, "shared") for mesh, dispatch in ordered]
    found += with_more_layers()
    return list({case.name: case for case in found if case.world == world}.values())


def with_more_layers() -> Iterator[Case]:
    """Yields each layer of `ranks.layers` on meshes of all kinds, each with one format that fits; formats alternate."""
    for number, layer in enumerate(MORE_LAYERS):
        for place, mesh in enumerate((((EP, 2),), ((TP, 2),), ((EP, 2), (TP, 2)))):
            options = [
                options
                for options in formats(mesh)
                if (layer not in NOT_SLICED or TP not in dict(mesh) or options.get("sequence_parallel"))
                and (layer not in NOT_BY_LOGITS or options.get("gather") != "logits")
            ]
            yield Case(mesh, options[(number + place) % len(options)], layer)


def parallel_of(case: Case, mesh: DeviceMesh) -> ParallelConfig:
    names = {name: name for name, _ in case.mesh}
    return ParallelConfig.from_mesh(mesh, **names, **case.options)


def token_set(case: Case, parallel: ParallelConfig, coordinate: dict[str, int]) -> tuple[int, ...]:
    """Returns the set of tokens of a rank: ranks that must have the same tokens have the same set."""
    same = {TP} | ({EP} if case.options.get("dispatch") == "replicated" else set())
    return tuple(coordinate[name] for name, _ in case.mesh if name not in same)


def coordinates(case: Case) -> list[dict[str, int]]:
    """Returns the coordinates of every rank, in order."""
    names = [name for name, _ in case.mesh]
    return [dict(zip(names, place, strict=True)) for place in itertools.product(*(range(n) for _, n in case.mesh))]


def inputs_of(case: Case, config: MoEConfig, which: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, logits and the direction of the loss for a set of tokens."""
    number = 0
    for place, (_, n) in zip(which, case.mesh, strict=False):
        number = number * n + place
    tokens = case.tokens[number % len(case.tokens)]
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(tokens, config.hidden_size, generator=generator)
    return (
        x,
        torch.randn(tokens, config.num_logits, generator=generator),
        torch.randn(tokens, config.hidden_size, generator=generator),
    )


def adapters_of(case: Case, config: MoEConfig, which: tuple[int, ...]) -> Tensor | None:
    """Returns the adapter ids of a set of tokens, with -1 among them."""
    if config.lora is None:
        return None
    generator = torch.Generator().manual_seed(17 + sum(which))
    return torch.randint(-1, config.lora.num_adapters, inputs_of(case, config, which)[0].shape[:1], generator=generator)


def run(case: Case, mesh: DeviceMesh, rank: int, forward: Callable[..., Tensor] = moe_fn.moe_forward) -> None:
    """Asserts that this rank's outputs and gradients are those of one process with all weights."""
    whole = ALL_LAYERS[case.layer]
    parallel = parallel_of(case, mesh)
    config = dataclasses.replace(whole, parallel=parallel)
    full = weights_for(whole, seed=3)
    placed = with_copies(full) if parallel.num_physical else full
    every = coordinates(case)
    mine = token_set(case, parallel, every[rank])
    x, logits, direction = (t.clone() for t in inputs_of(case, whole, mine))
    local = _leaves(moe_fn.shard_weights(config, placed))
    x.requires_grad_(), logits.requires_grad_()
    ids = adapters_of(case, whole, mine)
    capped = parallel.capacity is not None
    y, stats = moe_fn.moe_forward_with_stats(config, local, x, logits, adapter_ids=ids) if capped else (None, None)
    y = forward(config, local, x, logits, adapter_ids=ids) if y is None else y
    expected_x, expected_logits, all_y, all_weights = _expected(case, parallel, whole, full, every, rank)
    tensors = [t for t in torch.utils._pytree.tree_leaves(local) if t.is_floating_point()]
    found = torch.autograd.grad((y * direction).sum(), [x, logits, *tensors], allow_unused=True)
    own = x.detach()
    lora_gradients = _gradients_of_adapters(
        case, config, mesh, local, dict(zip(map(id, tensors), found[2:], strict=True))
    )
    gathers = parallel.dispatch == "all_gather" and parallel.sp is None
    payloads = [(own * 10).to(torch.int8).to(dtype) for dtype in PAYLOADS]
    along = moe_fn.parallel.gather_tokens(config, *payloads, own[:, :1]) if gathers else None
    by_hand = None if capped else _with_a_routing_of_ones_own(config, local, full, own, logits.detach(), ids)
    by_gate = (
        None
        if capped or case.layer not in MORE_LAYERS
        else _with_the_gate_inside(config, local, full, own, direction, ids)
    )
    # Asserted after the last collective: a rank that fails before would make the others wait.
    assert_matches(y, all_y, tolerance=1e-5, scale=0.1, name="y")
    assert_matches(_zeros(found[0], x), expected_x, tolerance=1e-5, scale=0.1, name="gradient of x")
    assert_matches(_zeros(found[1], logits), expected_logits, tolerance=1e-5, scale=0.1, name="gradient of logits")
    if by_hand is not None:
        assert_matches(*by_hand, tolerance=1e-5, scale=0.1, name="y of a caller's routing")
    if by_gate is not None:
        assert_matches(*by_gate, tolerance=1e-5, scale=0.3, name="y, and gradient of the gate inside the layer")
    if stats is not None:
        chosen = moe_fn.moe_route(whole, full, own, logits.detach(), adapter_ids=ids)[1].expert_ids
        dropped = int((chosen != within_capacity(case, whole, chosen)).sum())
        assert int(stats.dropped_slots) == dropped, f"dropped_slots is {int(stats.dropped_slots)}; expected {dropped}"
    if along is not None:
        _check_payloads(case, config, every[rank], along[:-1], along[-1])
    if parallel.num_physical:
        return  # each replica has a part of its expert's gradient
    gradients = dict(zip(map(id, tensors), found[2:], strict=True))
    wanted = moe_fn.shard_weights(config, all_weights)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias", "expert_norm"):
        ours, theirs = getattr(local, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None and ours.is_floating_point():
            assert_matches(
                _zeros(gradients[id(ours)], ours), theirs, tolerance=1e-5, scale=0.3, name=f"gradient of {name}"
            )
    for name, gradient in lora_gradients.items():
        assert_matches(gradient, getattr(wanted.lora, name), tolerance=1e-5, scale=0.3, name=f"gradient of lora.{name}")
    _check_gradients_of_what_all_have(case, whole, full, mine, local, gradients)


def _gradients_of_adapters(
    case: Case, config: MoEConfig, mesh: DeviceMesh, local: MoEWeights, gradients: dict[int, Any]
) -> dict[str, Tensor]:
    """Returns gradients of adapters, summed over the ranks that have the same adapters and other tokens, as in data
    parallelism.
    """
    if local.lora is None or config.lora is None:
        return {}
    sizes, found = {name: n for name, n in case.mesh if n > 1}, {}
    for field_ in dataclasses.fields(local.lora):
        name, t = field_.name, getattr(local.lora, field_.name)
        gradient = _zeros(gradients[id(t)], t).clone()
        parts = [EP] if EP in sizes and config.lora.shares(name) and case.options["dispatch"] != "replicated" else []
        sliced = (
            DP in sizes
            and EP not in sizes
            and case.options["dispatch"] == "all_gather"
            and not case.options.get("sequence_parallel")
        )
        for dim in parts + ([DP] if sliced and name in ("gate_up_a", "down_b") else []):
            dist.all_reduce(gradient, group=mesh.get_group(dim))
        found[name] = gradient
    return found


def with_copies(weights: MoEWeights) -> MoEWeights:
    """Returns weights of 8 slots, in which experts 0 and 3 have two replicas each."""
    placement = moe_fn.balance.placement_of_slots(torch.tensor([0, 1, 2, 3, 4, 5, 0, 3]), num_experts=6)
    tensors = {f.name: getattr(placement, f.name) for f in dataclasses.fields(placement)}
    return dataclasses.replace(weights, router=dataclasses.replace(weights.router, **tensors))


def _with_a_routing_of_ones_own(
    config: MoEConfig, local: MoEWeights, full: MoEWeights, x: Tensor, logits: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns y over ranks and of one rank for a given routing, with ids in an unsigned dtype.

    gather="logits" must not route these tokens again.
    """
    whole = dataclasses.replace(config, parallel=None)
    _, routing = moe_fn.moe_route(whole, full, x, logits, adapter_ids=ids)
    other = dataclasses.replace(
        routing, expert_ids=(routing.expert_ids + 1) % config.num_experts, weights=routing.weights * 0.5
    )
    narrow = dataclasses.replace(
        other, expert_ids=other.expert_ids.to(torch.uint8), adapter_ids=None if ids is None else ids.to(torch.int8)
    )
    return moe_fn.moe_forward_routed(config, local, x, narrow).detach(), moe_fn.moe_forward_routed(
        whole, full, x, other
    ).detach()


def _with_the_gate_inside(
    config: MoEConfig, local: MoEWeights, full: MoEWeights, x: Tensor, direction: Tensor, ids: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Returns y and the gradient of the gate, over ranks and of one rank, without logits as an argument."""
    found = []
    for own, weights in ((config, local), (dataclasses.replace(config, parallel=None), _leaves(full))):
        assert weights.router is not None and weights.router.gate is not None
        y = moe_fn.moe_forward(own, weights, x, adapter_ids=ids)
        (gradient,) = torch.autograd.grad((y * direction).sum(), [weights.router.gate], allow_unused=True)
        found.append((y.detach(), _zeros(gradient, weights.router.gate)))
    return found


def _check_payloads(
    case: Case, config: MoEConfig, coordinate: dict[str, int], payloads: tuple[Tensor, ...], scales: Tensor
) -> None:
    """Checks payloads of other dtypes and scales, in the order of the tokens of all ranks."""
    parallel = config.parallel
    assert parallel is not None
    dim = EP if any(name == EP and n > 1 for name, n in case.mesh) else DP
    sets = [token_set(case, parallel, {**coordinate, dim: place}) for place in range(dict(case.mesh)[dim])]
    rows = [inputs_of(case, config, which)[0] for which in sets]
    room = parallel.max_tokens or max(len(x) for x in rows)
    for dtype, payload in zip(PAYLOADS, payloads, strict=True):
        assert len(payload) == room * len(rows) and payload.dtype == dtype
        payload = payload.to(torch.float32)
        for place, x in enumerate(rows):
            block = slice(place * room, place * room + len(x))
            assert torch.equal(payload[block], (x * 10).to(torch.int8).to(dtype).to(torch.float32)) and torch.equal(
                scales[block], x[:, :1]
            )
            assert not payload[place * room + len(x) : (place + 1) * room].any()


def _check_gradients_of_what_all_have(
    case: Case, whole: MoEConfig, full: MoEWeights, mine: tuple[int, ...], local: MoEWeights, gradients: dict[int, Any]
) -> None:
    """Checks gradients of latent projections, norms and constants, which are complete for this rank's tokens."""
    x, logits, direction = inputs_of(case, whole, mine)
    leaves = _leaves(full)
    y = layer_of_one_process(case, whole, leaves, x, logits, mine)
    for path in (
        ("latent", "input"),
        ("latent", "output"),
        ("output_norm",),
        ("input_norm",),
        ("shared", "gate"),
        ("constants",),
    ):
        ours, theirs = local, leaves
        for name in path:
            ours, theirs = getattr(ours, name, None), getattr(theirs, name, None)
        if theirs is not None:
            (right,) = torch.autograd.grad((y * direction).sum(), [theirs], allow_unused=True, retain_graph=True)
            assert_matches(
                _zeros(gradients[id(ours)], ours),
                _zeros(right, theirs),
                tolerance=1e-5,
                scale=0.3,
                name=f"gradient of {path}",
            )


def _expected(
    case: Case, parallel: ParallelConfig, whole: MoEConfig, full: MoEWeights, every: list[dict[str, int]], rank: int
) -> tuple[Tensor, Tensor, Tensor, MoEWeights]:
    """Returns gradients of x and logits, y, and gradients of the weights, for the tokens of all ranks that share the
    layer with this one.
    """
    mine = token_set(case, parallel, every[rank])
    together = {token_set(case, parallel, c) for c in every if _works_with(case, every[rank], c)}
    leaves = _leaves(full)
    total = torch.zeros(())
    for which in sorted(together):
        x, logits, direction = inputs_of(case, whole, which)
        x.requires_grad_(), logits.requires_grad_()
        y = layer_of_one_process(case, whole, leaves, x, logits, which)
        total = total + (y * direction).sum()
        if which == mine:
            own = (x, logits, y)
    tensors = [t for t in torch.utils._pytree.tree_leaves(leaves) if t.is_floating_point()]
    found = torch.autograd.grad(total, [own[0], own[1], *tensors], allow_unused=True)
    by_id = {id(t): _zeros(g, t) for t, g in zip(tensors, found[2:], strict=True)}
    gradients = torch.utils._pytree.tree_map(lambda t: by_id.get(id(t), t), leaves)
    return _zeros(found[0], own[0]), _zeros(found[1], own[1]), own[2].detach(), gradients


def layer_of_one_process(
    case: Case, config: MoEConfig, weights: MoEWeights, x: Tensor, logits: Tensor, which: tuple[int, ...]
) -> Tensor:
    """Returns the layer of a set of tokens with all weights, without the slots beyond the case's capacity."""
    ids = adapters_of(case, config, which)
    if case.options.get("capacity") is None:
        return moe_fn.moe_forward(config, weights, x, logits, adapter_ids=ids)
    _, routing = moe_fn.moe_route(config, weights, x, logits, adapter_ids=ids)
    kept = within_capacity(case, config, routing.expert_ids)
    return moe_fn.moe_forward_routed(config, weights, x, dataclasses.replace(routing, expert_ids=kept))


def within_capacity(case: Case, config: MoEConfig, expert_ids: Tensor) -> Tensor:
    """Returns the ids [T, top_k] of one rank, with -1 for slots beyond the first `capacity` for a rank; all ranks have
    equally many consecutive experts.
    """
    sizes = dict(case.mesh)
    parts = sizes[TP] if case.options.get("sequence_parallel") else 1  # ranks, each of which sends a part of the rows
    owners = sizes.get(EP, 1) * parts
    kept, rows = expert_ids.clone(), -(-len(expert_ids) // parts) or 1
    for first in range(0, len(expert_ids), rows):
        room = [case.options["capacity"]] * owners
        for token, choice in itertools.product(range(first, min(first + rows, len(expert_ids))), range(config.top_k)):
            expert = int(expert_ids[token, choice])
            if 0 <= expert < config.num_experts:
                owner = expert * owners // config.num_experts
                room[owner] -= 1
                if room[owner] < 0:
                    kept[token, choice] = -1
    return kept


def _works_with(case: Case, one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether two ranks share a layer in forward; those of a data-parallel dim do if weights are sliced over it."""
    apart = DP in one and not (
        case.options.get("dispatch") == "all_gather" and EP not in one and not case.options.get("sequence_parallel")
    )
    return not apart or one[DP] == other[DP]


def _leaves(weights: MoEWeights) -> MoEWeights:
    return torch.utils._pytree.tree_map(
        lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t, weights
    )  # type: ignore[no-any-return]


def _zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def worker(rank: int, world: int, store: str, results: Any, which: Which = "cases") -> None:
    """Runs every job of a world on one rank, in order, and puts (name, error or None) of each into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    meshes: dict[Any, DeviceMesh] = {}
    for name, of_mesh, job, broken in jobs(world, which):
        if of_mesh not in meshes:
            names, sizes = zip(*of_mesh, strict=True)
            meshes[of_mesh] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        try:
            with broken:
                job(meshes[of_mesh], rank)
            results.put((rank, name, None))
        except Exception as error:
            results.put((rank, name, f"{type(error).__name__}: {str(error)[:600]}"))
    dist.destroy_process_group()


# (name, mesh, function to run, context such as a planted bug)
Job = tuple[str, tuple[tuple[str, int], ...], Callable[[DeviceMesh, int], None], Any]


def jobs(world: int, which: Which = "cases") -> list[Job]:
    """Returns the jobs of a rank: its cases, crossed or not, and those of loaded parts; or the case of every planted
    bug.
    """
    if which == "bugs":
        from planted.bugs import planted
        from planted.ranks import CASE_OF_BUG, RANK_BUGS

        return [_job(bug.what, CASE_OF_BUG[bug.what], run, planted(bug)) for bug in RANK_BUGS]
    found = [_job(case.name, case, run) for case in cases(world, which == "crossed")]
    if importlib.util.find_spec("safetensors") is not None:
        from ranks.loaded import loaded, run_loaded

        found += [_job(case.name, case, run_loaded) for case in loaded(world)]
    return found


def _job(name: str, case: Any, work: Callable[[Any, DeviceMesh, int], None], broken: Any = None) -> Job:
    return name, case.mesh, functools.partial(work, case), broken or contextlib.nullcontext()
