"""The table of weights, compared with sizes written out by hand: random weights have the sizes of the table, and cannot
show that it is wrong.
"""

import dataclasses

import pytest
import torch

from moe_fn import (
    ExpertNormConfig,
    LatentConfig,
    LoRAConfig,
    MoEConfig,
    NormsConfig,
    ParallelConfig,
    QuantConfig,
    RankGroup,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.records import WEIGHT_PATHS
from moe_fn.weights.shapes import expected_weights
from moe_fn.weights.spec import WEIGHTS, cut_of

EVERYTHING = MoEConfig(
    num_experts=5, top_k=2, hidden_size=12, intermediate_size=8, latent=LatentConfig(size=6), hidden_padding=1,
    expert_norm=ExpertNormConfig(),
    shared=SharedExpertsConfig(intermediate_size=10, count=2, gate="router"),
    zero_experts=ZeroExpertsConfig(count=3, kind="constant"),
    router=RouterConfig(scoring="sigmoid", correction_bias="scores"), norms=NormsConfig(input=True, output=True),
    lora=LoRAConfig(num_adapters=4, rank=3, experts="outer_shared"),
)  # fmt: skip
SIZES = {
    "gate_up": (5, 16, 7), "down": (5, 7, 8), "gate_up_bias": (5, 16), "down_bias": (5, 7), "expert_norm": (5, 7),
    "constants": (3, 12),
    "input_norm": (12,), "output_norm": (12,), "router.gate": (10, 12), "router.bias": (10,),
    "router.correction_bias": (8,),
    "router.expert_scale": (10,), "shared.gate_up": (40, 12), "shared.down": (12, 20), "shared.gate_up_bias": (40,),
    "shared.down_bias": (12,), "latent.input": (6, 12), "latent.output": (12, 6), "latent.input_bias": (6,),
    "latent.output_bias": (12,),
    "latent.input_norm": (6,), "latent.output_norm": (6,), "lora.gate_up_a": (4, 1, 3, 7),
    "lora.gate_up_b": (4, 5, 16, 3),
    "lora.down_a": (4, 5, 3, 8), "lora.down_b": (4, 1, 7, 3),
}  # fmt: skip
PLAIN = MoEConfig(num_experts=5, top_k=2, hidden_size=12, intermediate_size=8)


def sizes_of(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    return {".".join(row.path): row.sizes for row in expected_weights(config) if row.sizes is not None}


def test_the_table_has_a_row_for_every_weight_in_the_order_of_the_records() -> None:
    assert tuple(WEIGHTS) == WEIGHT_PATHS


def test_sizes_are_those_written_here() -> None:
    assert sizes_of(EVERYTHING) == SIZES
    required = {
        "gate_up",
        "down",
        "expert_norm",
        "constants",
        "input_norm",
        "output_norm",
        "router.correction_bias",
        "shared.gate_up",
    }
    required |= {"shared.down", "latent.input", "latent.output"}
    assert {".".join(row.path) for row in expected_weights(EVERYTHING) if row.required} == required


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"weight_layout": "in_out", "gate_up_layout": "interleaved"},
         {"gate_up": (5, 12, 16), "down": (5, 8, 12), "gate_up_bias": (5, 16)}),
        ({"activation": "silu_no_mul"}, {"gate_up": (5, 8, 12), "gate_up_bias": (5, 8)}),
        ({"router": RouterConfig(selection="hash")}, {"router.expert_ids_of_token": (-1, 2)}),
        ({"latent": LatentConfig(size=6), "router": RouterConfig(gate_input="transformed")}, {"router.gate": (5, 6)}),
        ({"shared": SharedExpertsConfig(intermediate_size=3, gate="sigmoid", activation="relu_no_mul")},
         {"shared.gate": (1, 12), "shared.gate_up": (3, 12), "shared.down": (12, 3)}),
        ({"lora": LoRAConfig(rank=3, experts="shared")},
        {"lora.gate_up_b": (1, 1, 16, 3), "lora.down_a": (1, 1, 3, 8)}),
        ({"quant": QuantConfig(scheme="int4", granularity="group", group_size=5, zero_points=True)},
         {"gate_up": (5, 16, 6), "down": (5, 12, 4), "quant.gate_up_scale": (5, 16, 3),
         "quant.down_zero_point": (5, 12, 2)}),
        ({"quant": QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=(3, 5))},
        {"quant.gate_up_scale": (5, 6, 3)}),
        ({"quant": QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=(3, 5)),
        "gate_up_layout": "interleaved"},
         {"quant.gate_up_scale": (5, 6, 3), "quant.down_scale": (5, 4, 2)}),
        ({"quant": QuantConfig(scheme="int8", granularity="tensor")},
        {"quant.gate_up_scale": (5, 2, 1), "quant.down_scale": (5, 1, 1)}),
        ({"quant": QuantConfig(scheme="nvfp4", granularity="group", group_size=16), "gate_up_layout": "interleaved"},
         {"quant.gate_up_global_scale": (5, 1, 1), "quant.down_global_scale": (5, 1, 1)}),
    ],
)  # fmt: skip
def test_sizes_follow_the_layouts_and_the_options(
    changes: dict[str, object], sizes: dict[str, tuple[int, ...]]
) -> None:
    found = sizes_of(dataclasses.replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert {name: found[name] for name in sizes} == sizes


def test_a_rank_has_its_experts_and_slices() -> None:
    ranks = ParallelConfig(
        tp=RankGroup(name="0", size=2, rank=1), ep=RankGroup(name="1", size=2, rank=1), num_physical=6
    )
    found = sizes_of(dataclasses.replace(EVERYTHING, expert_norm=None, parallel=ranks))
    own = {
        "gate_up": (3, 8, 7), "down": (3, 7, 4), "gate_up_bias": (3, 8), "shared.gate_up": (20, 12),
        "shared.down": (12, 10),
        "shared.gate_up_bias": (20,), "lora.gate_up_b": (4, 3, 8, 3), "lora.down_a": (4, 3, 3, 4),
        "router.logical_of_physical": (6,),
        "router.physical_of_logical": (5, -1), "router.num_replicas": (5,),
    }  # fmt: skip
    assert {name: found.get(name) for name in own} == own
    assert "down_bias" not in found and "shared.down_bias" not in found, "the first slice adds them"


def test_dtypes_of_codes_are_those_of_the_scheme() -> None:
    config = dataclasses.replace(PLAIN, quant=QuantConfig(scheme="int8", granularity="channel", zero_points=True))
    dtypes = {".".join(row.path): row.dtypes for row in expected_weights(config) if row.sizes and row.dtypes}
    floats, codes = (torch.float32, torch.bfloat16, torch.float16), (torch.uint8,)
    assert dtypes == {
        "gate_up": codes, "down": codes, "quant.gate_up_scale": floats, "quant.down_scale": floats,
        "quant.gate_up_zero_point": codes,
        "quant.down_zero_point": codes,
    }  # fmt: skip


def test_matrices_are_in_the_dtype_of_x_and_maps_are_integers() -> None:
    kinds = {".".join(row.path): row.kind for row in expected_weights(EVERYTHING)}
    compute = {"gate_up", "down", "shared.gate_up", "shared.down", "latent.input", "latent.output"}
    compute |= {"lora.gate_up_a", "lora.gate_up_b", "lora.down_a", "lora.down_b"}
    assert {name for name, kind in kinds.items() if kind == "compute"} == compute
    maps = {"expert_ids_of_token", "logical_of_physical", "physical_of_logical", "num_replicas"}
    assert {name for name, kind in kinds.items() if kind == "integer"} == {f"router.{name}" for name in maps}


def test_slices_cut_these_dims() -> None:
    """(dim, number of parts that are cut separately) of slices of the experts' intermediates. All slices
    share the scale of a whole matrix.
    """
    cuts = {"gate_up": (1, 2), "down": (2, 1), "gate_up_bias": (1, 2), "lora.gate_up_b": (2, 2), "lora.down_a": (3, 1)}
    assert {
        ".".join(path): cut for path in WEIGHTS if path[0] != "quant" and (cut := cut_of(EVERYTHING, path, "I"))
    } == cuts
    shared = {"shared.gate_up": (0, 4), "shared.down": (1, 2), "shared.gate_up_bias": (0, 4)}
    assert {".".join(path): cut for path in WEIGHTS if (cut := cut_of(EVERYTHING, path, "M"))} == shared
    turned = dataclasses.replace(PLAIN, weight_layout="in_out", gate_up_layout="interleaved")
    assert (cut_of(turned, ("gate_up",), "I"), cut_of(turned, ("down",), "I")) == ((2, 1), (1, 1))
    for granularity, scales in {"channel": {"gate_up_scale": (1, 2)}, "tensor": {}}.items():
        config = dataclasses.replace(PLAIN, quant=QuantConfig(scheme="int8", granularity=granularity))  # type: ignore[arg-type]
        found = {
            name: cut_of(config, ("quant", name), "I")
            for name in ("gate_up_scale", "down_scale", "gate_up_global_scale")
        }
        assert {name: cut for name, cut in found.items() if cut is not None} == scales


def test_replicated_shared_experts_are_whole() -> None:
    ranks = ParallelConfig(tp=RankGroup(name="0", size=2, rank=1), shared="replicated")
    found = sizes_of(dataclasses.replace(EVERYTHING, expert_norm=None, parallel=ranks))
    assert {name: found[name] for name in ("shared.down", "shared.down_bias", "down")} == {
        "shared.down": (12, 20), "shared.down_bias": (12,), "down": (5, 7, 4),
    }  # fmt: skip
