"""Valid configs and checkpoints, which the targets damage."""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quantized_files
import torch
from safetensors.torch import save

from moe_fn import (
    ActivationConfig,
    ActivationQuantConfig,
    ExpertNormConfig,
    GroupConfig,
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
)  # fmt: skip
from moe_fn.checkpoint import LAYOUTS, load_moe_layer, save_moe_weights
from moe_fn.families import FAMILIES, config_of_layer
from moe_fn.families.find import PARTS
from moe_fn.families.keys import Key
from moe_fn.testing import weights_for

Files = dict[str, bytes]  # of a folder
SIZES: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 6, "intermediate_size": 4}
_TWO = RankGroup(name="0", size=2, rank=1)
CONFIGS: tuple[MoEConfig, ...] = (
    MoEConfig(
        **SIZES, router=RouterConfig(groups=GroupConfig(count=2, top_k=1), correction_bias="scores",
        renormalize_epsilon=1e-20),
        activation=ActivationConfig(limit=7.0, alpha=1.702, up_offset=1.0),
        shared=SharedExpertsConfig(intermediate_size=2),
        latent=LatentConfig(size=4), norms=NormsConfig(input=True), zero_experts=ZeroExpertsConfig(count=2),
        chunk_tokens=8,
    ),
    MoEConfig(
        **SIZES, quant=QuantConfig(
            scheme="int4", granularity="group", group_size=2, zero_points=True,
            activations=ActivationQuantConfig(scheme="int8", granularity="token"),
        ),
        lora=LoRAConfig(num_adapters=2, rank=2), expert_norm=ExpertNormConfig(),
        parallel=ParallelConfig(ep=_TWO, dispatch="all_to_all_static", max_tokens=4, placement=(0, 1, 0, 1),
        shared="replicated"),
    ),
    MoEConfig(
        **(SIZES | {"intermediate_size": 8}), quant=QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=(1,
        2)),
        parallel=ParallelConfig(tp=_TWO, dp=dataclasses.replace(_TWO, name="1"), dispatch="all_gather"),
    ),
)  # fmt: skip
# Keys that most families need; with one group there is no group limit.
MODEL: dict[str, Any] = {
    "num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3, "moe_num_experts": 3, "num_experts_per_tok": 2,
    "hidden_size": 4,
    "d_model": 4, "intermediate_size": 2, "moe_intermediate_size": 2, "ffn_hidden_size": 2, "d_ff": 2,
    "shared_expert_intermediate_size": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_topk": 2, "output_multiplier": 1.0, "moe_hidden_size": 2,
    "mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0, "shared_experts_intermediate_size": 2, "moe_k": 2,
    "hidden_act": "silu",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "swiglu_limits": [None, 7.0], "rms_norm_eps": 1e-6,
    "top_k_experts": 2,
}  # fmt: skip
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False, "init_lora_weights": True,
    "rank_pattern": {r"experts.\d+.down_proj": 1}, "alpha_pattern": {"mlp.experts.down_proj": 3.0},
    "target_parameters": [],
}  # fmt: skip


def models() -> tuple[dict[str, Any], ...]:
    """Returns a config.json for every family."""
    return tuple(MODEL | {"model_type": family.names[0]} for family in FAMILIES)


def dictionary() -> tuple[str, ...]:
    """Returns the keys that a family's config may have, names of model types, and strings of quantization configs."""
    found = (
        {name for family in FAMILIES for key in _keys_in(family) for name in key.names}
        | set(MODEL)
        | {"text_config", "ffn_config"}
    )
    found |= {name for family in FAMILIES for name in family.names} | set(PARTS)
    for made in quantized_files.FORMATS.values():
        found |= set(_strings(made.words))
    more = (
        "quantization_config",
        "compression_config",
        "weight_map",
        "__metadata__",
        "dynamic",
        "shape",
        "dtype",
        "data_offsets",
        "F32",
    )
    return tuple(sorted(found | set(more)))


def config_dictionary() -> tuple[str, ...]:
    """Returns names and values of MoEConfig."""
    return tuple(
        sorted(
            {name for config in CONFIGS for name in _strings(config.to_dict())}
            | {"sigmoid", "hash", "native", "mxfp4", "torch"}
        )
    )


def _keys_in(value: Any) -> Iterator[Key]:
    if isinstance(value, Key):
        yield value
    if isinstance(value, dict):
        for entry in value.values():
            yield from _keys_in(entry)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _keys_in(getattr(value, field.name))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from (name, *_strings(entry))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


@functools.cache
def checkpoints() -> tuple[Files, ...]:
    """Returns folders with a layer each: for every quantized format, and every layout that MODEL and random weights
    fill.
    """
    found = [
        _files_of(lambda folder, made=made: quantized_files.write(folder, made))
        for made in quantized_files.FORMATS.values()
    ]
    found.append(_files_of(lambda folder: quantized_files.write(folder, quantized_files.FORMATS["awq"], shards=3)))
    for row in LAYOUTS:
        for family in row.families:
            try:
                found.append(
                    _files_of(
                        lambda folder, row=row, family=family: _write(folder, row, MODEL | {"model_type": family})
                    )
                )
                break
            except ValueError:
                continue
    return tuple(found)


def _write(folder: Path, row: Any, model: dict[str, Any]) -> None:
    config = config_of_layer(model, 0)
    prefix = ".".join(filter(None, ["model.layers.0", row.block]))
    save_moe_weights(folder, prefix, config, weights_for(config, bias=False, scales=False), layout=row)
    (folder / "config.json").write_text(json.dumps(model))
    load_moe_layer(folder, 0)


def adapters() -> tuple[Files, ...]:
    """Returns folders in PEFT's two formats, for MoEConfig(**SIZES) at "layers.0.mlp"."""
    each = {
        f"experts.{e}.{name}": size for e in range(4) for name, size in (("gate_proj", (6, 4)), ("up_proj", (6, 4)))
    }
    each |= {f"experts.{e}.down_proj": (4, 6) for e in range(4)}
    ranks = {name: 1 if name.endswith("down_proj") else 2 for name in each}
    modules = {
        name: (torch.ones(ranks[name], size), torch.ones(out, ranks[name])) for name, (size, out) in each.items()
    }
    of_all = {
        "experts.base_layer": (torch.ones(8, 6), torch.ones(8, 8)),
        "experts": (torch.ones(8, 4), torch.ones(6, 8)),
    }
    plain = ADAPTER | {"rank_pattern": {}, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return _adapter(ADAPTER, modules), _adapter(plain, of_all)


def _adapter(values: dict[str, Any], modules: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Files:
    before = "base_model.model.layers.0.mlp."
    tensors = {
        f"{before}{name}.lora_{side}.weight": pair[side == "B"] for name, pair in modules.items() for side in "AB"
    }
    return {"adapter_config.json": json.dumps(values).encode(), "adapter_model.safetensors": save(tensors)}


def _files_of(write: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
