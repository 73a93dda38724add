"""Loads LoRA adapters saved by PEFT (adapter_config.json and adapter_model.safetensors) into `LoRAWeights`.

PEFT has two forms for experts, and both are read (names relative to the block's prefix; PEFT puts "base_model.model."
before it):

    a module for each expert    experts.{e}.{gate_proj,up_proj,down_proj}.lora_A.weight [r, in], .lora_B.weight [out, r]
                                (or w1, w3, w2 for gate, up and down)
    a parameter of all experts  experts[.base_layer].lora_A.weight [E r, in], row e r + j; .lora_B.weight [out, r E],
                                column j E + e
    (target_parameters)         with adapters of both products base_layer is gate_up_proj; with one,
                                adapter_config.json names it

Up to peft 0.18 `in` and `out` of the second form are exchanged for models that store [E, out, in]; such adapters are
transposed. They are recognized by the shape of the parameter, or of the other parameter of the same experts, and if
both are square by peft's version (`moe_fn.checkpoint.peft_versions`).
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_fn.checkpoint.adapter_modules import GateUpLayout, Kept, Module, WeightLayout, modules_of_block
from moe_fn.checkpoint.peft_config import AdapterConfig, read_adapter_config
from moe_fn.checkpoint.safetensors_files import open_tensors, read_header
from moe_fn.config import MoEConfig
from moe_fn.layer.lora import padded_to
from moe_fn.numerics import accumulation_dtype
from moe_fn.records import LoRAWeights

MODEL = "adapter_model.safetensors"
Factors = tuple[Tensor, Tensor]  # A [E, rank, in], B [E, out, rank]


def load_lora(
    path: str | Path,
    prefix: str,
    config: MoEConfig,
    *,
    gate_up_layout: GateUpLayout | None = None,
    weight_layout: WeightLayout | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoRAWeights:
    """The adapter of a block in a PEFT folder, for `moe_fn.add_lora`; B is multiplied by alpha / rank (or
    alpha / sqrt(rank)).

    path            the folder that save_pretrained wrote
    prefix          of the names of the block in the model: "model.layers.3.mlp"
    config          of the whole block; the result has its gate_up_layout
    gate_up_layout  of the model's gate_up_proj, if the adapter is of that; None: the config's
    weight_layout   of the model's parameters that hold all experts; used if inputs and outputs have the same size;
                    None: the config's
    dtype           of the result; None: as in the file

    Ranks and alphas may differ (rank_pattern, alpha_pattern): smaller ranks are padded with zeros, and experts without
    an adapter get zeros. Separate adapters of gate and up become one with the sum of their ranks, block-diagonal in B.

    Raises ValueError before any tensor is read: for a folder without an adapter of this block, for wrong shapes or
    ranks, for adapters of the block's router or shared experts, and for anything but plain LoRA: DoRA, biases,
    initializations that change the base weights (pissa, olora, ...). Nothing in the folder is trusted; patterns whose
    matching could take long are refused.

    Laws
        An adapter of PEFT is loaded as it was saved.

    Source: peft 0.21.2 (ParamWrapper, transformers_weight_conversion); the tests compare with peft's own outputs.
    """
    folder = Path(path)
    adapter = read_adapter_config(folder)
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder} has no {MODEL}; expected the adapter's tensors there (no pickles are read)")
    header = read_header(folder / MODEL)
    found_layout = gate_up_layout or config.gate_up_layout
    modules = modules_of_block(folder, prefix, header, config, adapter, Kept(weight_layout, found_layout))
    factors = _read(folder / MODEL, modules, config, adapter, dtype, device)
    experts = config.num_experts
    down, fused = (_of_experts(factors, part, experts) for part in ("down", "gate_up"))
    if fused is None:
        gate_up, found = (
            _gate_and_up(_of_experts(factors, "gate", experts), _of_experts(factors, "up", experts)),
            "packed",
        )
    else:
        gate_up, found = fused, found_layout
    if gate_up is not None and config.gate_up_parts == 2:
        gate_up = gate_up[0], _in_layout(gate_up[1], found, config.gate_up_layout)
    tensors = {"gate_up": gate_up, "down": down}
    return LoRAWeights(
        **{f"{n}_{side}": t[0 if side == "a" else 1].unsqueeze(0) for n, t in tensors.items() if t for side in "ab"}
    )


def _read(
    file: Path,
    modules: Mapping[Module, tuple[str, str]],
    config: MoEConfig,
    adapter: AdapterConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[Module, Factors]:
    """A [E or 1, rank, in] and scaled B [E or 1, out, rank] of each module."""
    factors: dict[Module, Factors] = {}
    dtypes: set[torch.dtype] = set()
    with open_tensors(file) as opened:
        for module, names in modules.items():
            a, b = (opened.get_tensor(name) for name in names)
            dtypes |= {a.dtype, b.dtype}
            experts = config.num_experts if module.expert is None else 1
            a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
            a, b = (b.transpose(1, 2), a.transpose(1, 2)) if module.turned else (a, b)
            factors[module] = a, b.to(accumulation_dtype(b.dtype)) * adapter.scaling_of(module.name)
    kept = dtype or functools.reduce(torch.promote_types, dtypes)
    return {
        module: (a.to(device, kept).contiguous(), b.to(device, kept).contiguous()) for module, (a, b) in factors.items()
    }


def _of_experts(factors: Mapping[Module, Factors], part: str, experts: int) -> Factors | None:
    """A [E, rank, in] and B [E, out, rank] of one product; None if it has no adapter."""
    chosen = {module.expert: pair for module, pair in factors.items() if module.part == part}
    if not chosen or None in chosen:
        return chosen.get(None)
    rank = max(a.shape[1] for a, _ in chosen.values())
    (first_a, first_b), *_ = chosen.values()
    nothing = first_a.new_zeros(1, rank, first_a.shape[2]), first_b.new_zeros(1, first_b.shape[1], rank)
    pairs = [chosen.get(expert, nothing) for expert in range(experts)]
    return torch.cat([padded_to(a, rank, 1) for a, _ in pairs]), torch.cat([padded_to(b, rank, 2) for _, b in pairs])


def _gate_and_up(gate: Factors | None, up: Factors | None) -> Factors | None:
    """The adapter of gate_up from those of gate and up: A concatenated, B block-diagonal, gates first."""
    either = gate or up
    if either is None:
        return None
    nothing = either[0].narrow(1, 0, 0), either[1].narrow(2, 0, 0)
    (gate_a, gate_b), (up_a, up_b) = gate or nothing, up or nothing
    rank = gate_a.shape[1] + up_a.shape[1]
    above = padded_to(gate_b, rank, 2)
    below = torch.cat([up_b.new_zeros(*up_b.shape[:2], gate_a.shape[1]), up_b], 2)
    return torch.cat([gate_a, up_a], 1), torch.cat([above, below], 1)


def _in_layout(b: Tensor, found: str, wanted: str) -> Tensor:
    """gate_up's B with its rows in the wanted layout: gates then ups ("packed"), or alternating ("interleaved")."""
    if found == wanted:
        return b
    by_half: Tensor = b.unflatten(1, (2, -1) if found == "packed" else (-1, 2))
    return by_half.transpose(1, 2).flatten(1, 2)
