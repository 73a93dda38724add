"""A layer sharded over ranks sends the bytes of `traffic`, and computes its shared experts during the communication."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from compile_tests.fake_ranks import (
    COLLECTIVES,
    Echo,
    collectives_in,
    fake_ranks,
    id_of,
    layer_of,
    parallel_of,
    short_name,
)
from compile_tests.graphs import Graphs, graphs_of, name_of
from compile_tests.rank_graphs import FORMATS, MOST, config_of, leaves_of_rank, tokens_of
from moe_fn import (
    ActivationQuantConfig,
    LatentConfig,
    LoRAConfig,
    MoEConfig,
    ParallelConfig,
    QuantConfig,
    RouterConfig,
    SharedExpertsConfig,
)
from moe_fn.parallel import Traffic, traffic

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SHARED_PRODUCT = "aten.mm"


def counted(gm: fx.GraphModule, config: MoEConfig, slots: int) -> Counter[tuple[str, str, int]]:
    """Returns (collective, group, bytes of the payload) of each collective in a graph, with evenly spread
    slots for sizes that depend on data.
    """
    parallel = config.parallel
    assert parallel is not None
    groups = {
        getattr(parallel, name).name: name for name in ("sp", "tp", "dp", "ep") if getattr(parallel, name) is not None
    }
    found: Counter[tuple[str, str, int]] = Counter()
    for node in collectives_in(gm):
        value = node.args[0].meta["val"]  # type: ignore[union-attr]
        size = 1
        for length in value.shape:
            symbols = free_unbacked_symbols(length)
            ranks = parallel.ep.size if parallel.ep else 1
            # otherwise it is the largest number of tokens
            each = slots // ranks if parallel.dispatch == "all_to_all" else slots // config.top_k
            size *= int(length.node.expr.xreplace(dict.fromkeys(symbols, each))) if symbols else int(length)
        group = next(
            groups[arg] for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, str) and arg in groups
        )
        found[COLLECTIVES[short_name(node)], group, size * value.element_size()] += 1
    return found


def said(t: Traffic, merged: dict[str, str]) -> Counter[tuple[str, str, int]]:
    """Returns the same for `traffic`. merged: names of groups that are the same group, as sp and ep in a mesh
    of one dim.
    """
    return Counter((m.collective, merged.get(m.group, m.group), m.payload) for m in t.messages)


FP8_GROUPS = QuantConfig(
    scheme="fp8_e4m3",
    granularity="group",
    group_size=2,
    activations=ActivationQuantConfig(scheme="fp8_e4m3", granularity="group", group_size=2),
)
BASE = {"num_experts": 8, "top_k": 2}
LAYERS: dict[str, dict[str, Any]] = {
    "shared": {},
    "plain": {"shared": None},
    "fp8 groups": {"shared": None, "quant": FP8_GROUPS},
    "latent, padding, gate": {
        "shared": SharedExpertsConfig(intermediate_size=8, gate="sigmoid"),
        "latent": LatentConfig(size=12),
        "hidden_padding": 4,
    },
    "router-weighted": {
        "shared": SharedExpertsConfig(intermediate_size=8, count=2, gate="router"),
        "router": RouterConfig(scoring="sigmoid", scale_on="output", routed_scaling_factor=2.0),
    },
    "lora": {"shared": None, "lora": LoRAConfig(num_adapters=2, rank=2)},
    "lora that experts share": {"shared": None, "lora": LoRAConfig(num_adapters=2, rank=2, experts="outer_shared")},
}
MESHES: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    *(
        ({form.along: 4}, form.options)
        for name, form in FORMATS.items()
        if name not in ("all_to_all by a table", "sequence, all_gather that asks")
    ),
    ({"ep": 2, "tp": 2}, {"dispatch": "replicated"}),
    ({"ep": 2, "tp": 2}, {"dispatch": "all_gather", "gather": "logits", "max_tokens": MOST}),
    ({"ep": 2, "tp": 2}, {"dispatch": "all_to_all_static", "max_tokens": MOST, "shared": "replicated"}),
    ({"ep": 2, "tp": 2}, {"sequence_parallel": True, "dispatch": "all_to_all"}),
    ({"dp": 2, "tp": 2}, {"dispatch": "all_gather", "max_tokens": MOST}),
    ({"dp": 2, "tp": 2}, {"dispatch": "all_gather", "max_tokens": MOST, "ordered_sums": True}),
)
_WITHOUT_LORA = [layer for layer in LAYERS if "lora" not in LAYERS[layer]]
COUNTED = [(mesh, options, _WITHOUT_LORA[i % len(_WITHOUT_LORA)]) for i, (mesh, options) in enumerate(MESHES)] + [
    ({"tp": 4}, {"dispatch": "replicated"}, layer) for layer in _WITHOUT_LORA[2:]
]
COUNTED += [
    (mesh, options, "lora that experts share" if i % 2 else "lora") for i, (mesh, options) in enumerate(MESHES[-5:])
]


# Each format and each layer above once, and groups that need ranks along two dimensions; the others are combinations.
OFTEN = (2, 3, 5, 6, 7, 9, 11, 12, 14, 15, 16, 20, 22, 25)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[pytest.mark.thorough] * (number not in OFTEN),
            id=f"{id_of(case[:2])}-{'-'.join(map(str, case[1]))}-{case[2]}",
        )
        for number, case in enumerate(COUNTED)
    ],
)
def test_the_graphs_send_the_bytes_that_traffic_says(case: Any) -> None:
    mesh, options, layer = case
    # as many slots as there are ranks, and more
    tokens, dtype = (16 if "sequence_parallel" in options else 4), torch.bfloat16
    with fake_ranks(4, rank=1):
        config = config_of(parallel_of(mesh, options), experts=8, inner=8, **LAYERS[layer])
        weights = leaves_of_rank(config, dtype)
        graphs = graphs_of(
            layer_of(config),
            (weights, *tokens_of(config, tokens, 0, dtype, mark=False)),
            fullgraph=True,
            interpreter=Echo,
        )
    parallel = config.parallel
    assert parallel is not None
    merged = {"sp": "ep"} if parallel.sp and parallel.ep and parallel.sp.name == parallel.ep.name else {}
    rows = -(-tokens // parallel.sp.size) if parallel.sp else tokens
    for backward, gm in ((False, graphs.forward[0]), (True, graphs.backward[0])):
        wanted = said(traffic(config, tokens, dtype, backward, weights), merged)
        found = counted(gm, config, rows * config.top_k)
        found = merge_weights(found, weights, parallel) if backward else found
        assert found == wanted, (
            f"backward={backward}: in the graph only {found - wanted}, in traffic only {wanted - found}"
        )


def merge_weights(
    found: Counter[tuple[str, str, int]], weights: Any, parallel: ParallelConfig
) -> Counter[tuple[str, str, int]]:
    """Merges gradients of weights, which are sent one by one: `traffic` has one message for each part of the layer."""
    if parallel.sp is None:
        return found
    group = "ep" if parallel.ep and parallel.ep.name == parallel.sp.name else "sp"
    for part in ("shared", "latent", "constants", "input_norm", "output_norm"):
        sizes = [
            t.numel() * t.element_size()
            for t in torch.utils._pytree.tree_leaves(getattr(weights, part))
            if t is not None
        ]
        if sizes:
            found = (
                found
                - Counter(("all_reduce", group, size) for size in sizes)
                + Counter({("all_reduce", group, sum(sizes)): 1})
            )
    return found


def test_bytes_of_a_ring_add_up() -> None:
    with fake_ranks(4, rank=1):
        config = config_of(parallel_of({"ep": 4}, {"dispatch": "all_to_all"}), experts=8)
    t = traffic(config, 8, torch.bfloat16)
    assert t.sent == 8 * 3 + 12 * (2 * 8 + 8) + 12 * 2 * 8  # 12 of 16 slots are sent
    assert t.by("group") == {("ep",): t.sent}
    assert traffic(dataclasses.replace(config, parallel=None), 8, torch.bfloat16).sent == 0


OVERLAPPED = [
    "replicated over ep",
    "all_gather",
    "all_to_all",
    "all_to_all_static",
    pytest.param("sequence, all_to_all_static", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("name", OVERLAPPED)
def test_shared_experts_are_computed_while_tokens_travel(name: str) -> None:
    form = FORMATS[name]
    with fake_ranks(2, rank=1):
        config = config_of(parallel_of({form.along: 2}, form.options))
        graphs = graphs_of(
            layer_of(config), (leaves_of_rank(config), *tokens_of(config, 5, seed=0)), fullgraph=True, interpreter=Echo
        )
    begun, waited, products = places(graphs)
    assert len(products) == 2, products
    # Between the start of the collective of tokens, and the first wait for it or for a collective that started with it.
    assert any(begin < products[0] and products[1] < wait for begin, wait in zip(begun, waited, strict=True)), (
        begun,
        waited,
        products,
    )
    assert not depends_on_collectives(graphs.forward[0])


def places(graphs: Graphs) -> tuple[list[int], list[int], list[int]]:
    """Returns positions in the forward graph: starts of collectives, the wait of each, and products of shared
    experts.
    """
    order = {node: i for i, node in enumerate(graphs.forward[0].graph.nodes)}
    begun = collectives_in(graphs.forward[0])
    waited = [min(order[user] for user in node.users if short_name(user) == "wait_tensor") for node in begun]
    return (
        [order[node] for node in begun],
        waited,
        [i for node, i in order.items() if name_of(node).startswith(SHARED_PRODUCT)],
    )


def depends_on_collectives(gm: fx.GraphModule) -> bool:
    """Whether a product of the shared experts depends on the result of a collective."""
    seen = [node for node in gm.graph.nodes if name_of(node).startswith(SHARED_PRODUCT)]
    for node in seen:
        seen += [before for before in node.all_input_nodes if before not in seen]
    return any(short_name(node) in COLLECTIVES for node in seen)
