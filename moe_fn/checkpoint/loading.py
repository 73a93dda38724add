"""The loader: folders of safetensors to MoEWeights, whole or as the part of a rank."""

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
    """The weights of a block in a checkpoint, or the part of them that a rank has.

    With config.parallel they are this rank's: what `moe_fn.shard_weights` makes of the whole, of which only these bytes
    are read.

    path                 a folder with model.safetensors, or with shards and an index; or one .safetensors file
    prefix               what the names of the block begin with: "model.layers.3.mlp"
    config               of the whole block; its weight_layout and gate_up_layout are those of the result; its quant is
                         the checkpoint's
    layout               a row of `moe_fn.checkpoint.LAYOUTS`, or its name; None: by model_type in config.json, and by
                         names
    experts              without config.parallel: ids of the experts to load, in this order, repeats allowed; None: all
    intermediate         likewise: of every expert, these columns of the first product and rows of the last; None: all
    shared_intermediate  the same of every shared expert
    placement            with parallel.num_physical: which expert is in which slot (`moe_fn.balance`), of this layer
    dtype                of the result, but for the router, codes and their scales; None: as in the file

    down_bias comes with the slice of the experts that begins at 0, and with no other; the shared experts' with theirs:
    outputs of slices are summed, and a bias is to be in the sum once. All else that has no such axis is whole on every
    rank: router, latent projections. The files are mapped and only the bytes of the slices are read; every tensor is
    allocated once, its pieces are copied into place.

    Codes and scales of quantized experts are laid as `QuantWeights` has them, and never rounded anew; of a gate and its
    up that say different input scales, the larger counts. config.quant.activations may be another than the
    checkpoint's, or None. Shared experts and latent projections that are quantized become floats: of `dtype`, or of
    config.json's.

    Raises ValueError before anything is allocated: for files that are cut short or whose headers lie, and for every
    tensor of the block that is missing, surplus, mis-shaped or of a wrong dtype, with what was expected; for methods of
    quantization that are not known or contradict the tensors; for slices of experts that cut through what shares a
    scale or a byte, and slices by hand with config.parallel.

    Laws
        Slices of ranks make up the whole.
        Loading by the config is sharding the whole.

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
    """load_moe_weights of a checkpoint that is open."""
    check_config("load_moe_weights", config)
    whole = dataclasses.replace(config, parallel=None)
    plan = plan_of_block(checkpoint, headers_of_block(checkpoint, prefix), prefix, whole, layout)
    weights = read_weights(checkpoint.folder, plan, slices_of(config, wanted), dtype, device)
    return with_placement(weights, wanted.placement)
