"""Loads `MoEWeights` from safetensors, whole or one rank's part."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_fn.balance import Placement
from moe_fn.checkpoint.choose_layout import headers_of_block, plan_of_block
from moe_fn.checkpoint.folder import Checkpoint, open_checkpoint
from moe_fn.checkpoint.layout import Layout
from moe_fn.checkpoint.read_plan import read_weights
from moe_fn.checkpoint.slices import Wanted, slices_of, with_placement
from moe_fn.config import MoEConfig
from moe_fn.records import MoEWeights
from moe_fn.weights.check import check_config


def load_moe_weights(
    path: str | Path,
    prefix: str,
    config: MoEConfig,
    *,
    layout: Layout | str | None = None,
    experts: Sequence[int] | None = None,
    intermediate: slice | None = None,
    shared_intermediate: slice | None = None,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> MoEWeights:
    """The weights of a block in a checkpoint, whole or one rank's part.

    With config.parallel the result equals `moe_fn.shard_weights` of the whole weights, but only this rank's bytes are
    read.

    path                 a folder with model.safetensors, or with shards and an index; or one .safetensors file
    prefix               of the names of the block's tensors: "model.layers.3.mlp"
    config               of the whole block; the result has its weight_layout and gate_up_layout; its quant is the
                         checkpoint's
    layout               a row of `moe_fn.checkpoint.LAYOUTS`, or its name; None: chosen by model_type in config.json,
                         and by tensor names
    experts              without config.parallel: ids of the experts to load, in this order, repeats allowed; None: all
    intermediate         without config.parallel: columns of every expert's gate_up and rows of its down; None: all
    shared_intermediate  the same for every shared expert
    placement            with parallel.num_physical: this layer's placement of experts in slots (`moe_fn.balance`)
    dtype                of the result, except the router, codes and their scales; None: as in the file

    down_bias is loaded only with the slice of intermediate that begins at 0, because the outputs of slices are summed
    and the sum has the bias once; the same holds for the shared experts' down_bias. Tensors without these axes (router,
    latent projections) are whole on every rank. Files are memory-mapped and only the bytes of the slices are read;
    every tensor is allocated once, and pieces are copied into it.

    Codes and scales of quantized experts are rearranged for `QuantWeights` and never rounded again. If gate and up have
    different input scales, the larger one is used. config.quant.activations may differ from the checkpoint's, or be
    None. Quantized shared experts and latent projections are dequantized, to `dtype` or config.json's dtype.

    Raises ValueError before anything is allocated: for files that are cut short or do not match their headers; for
    every missing or unexpected tensor of the block, and every wrong shape or dtype with the expected one; for unknown
    quantization methods, or ones that contradict the tensors; for slices of experts that split a tile with one scale or
    a byte; and for slices together with config.parallel.

    Laws
        Slices of ranks make up the whole.
        Loading with config.parallel equals sharding the whole.

    Source: the safetensors format (github.com/huggingface/safetensors); names as transformers 5.23 converts them.

    >>> import tempfile
    >>> from moe_fn import RouterWeights
    >>> from moe_fn.checkpoint import save_moe_weights
    >>> config = MoEConfig(num_experts=4, top_k=1, hidden_size=3, intermediate_size=6)
    >>> weights = MoEWeights(gate_up=torch.randn(4, 12, 3), down=torch.randn(4, 3, 6),
    ...     router=RouterWeights(gate=torch.randn(4, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_moe_weights(folder, "model.layers.0.mlp", config, weights, layout="qwen")
    ...     mine = load_moe_weights(folder, "model.layers.0.mlp", config, experts=range(2, 4), intermediate=slice(0, 3))
    >>> mine.down.shape, torch.equal(mine.down, weights.down[2:, :, :3])
    (torch.Size([2, 3, 3]), True)
    """
    checkpoint = open_checkpoint(path)
    wanted = Wanted(experts, intermediate, shared_intermediate, placement)
    return load_from(checkpoint, prefix, config, layout, wanted, dtype=dtype, device=device)


def load_from(
    checkpoint: Checkpoint,
    prefix: str,
    config: MoEConfig,
    layout: Layout | str | None,
    wanted: Wanted,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> MoEWeights:
    """load_moe_weights for an opened checkpoint."""
    check_config("load_moe_weights", config)
    whole = dataclasses.replace(config, parallel=None)
    plan = plan_of_block(checkpoint, headers_of_block(checkpoint, prefix), prefix, whole, layout)
    weights = read_weights(checkpoint.folder, plan, slices_of(config, wanted), dtype, device)
    return with_placement(weights, wanted.placement)
