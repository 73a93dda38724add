"""Constructs blocks of transformers from rows: float32, eval mode, eager experts, random parameters and buffers."""

import importlib
import re
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from shared_tests.zoo.row import BlockRow

# Pattern of a tensor's name, and the middle and half width of its uniform distribution; the first match counts. Other
# matrices are normal with the standard deviation gain / sqrt(fan in). A norm's weight varies around its value (0 or 1).
DRAWS = (
    (r"(correction_bias|expert_bias|balancing_biases)$", 0.0, 0.3),
    (r"(^|\.)(scale|per_expert_scale|global_scale|router_states_scale|layer_scalar)$", 1.0, 0.4),
    (r"bias$", 0.0, 0.5),
)
# large enough that logits differ clearly between experts
GAINS = ((r"(^|\.)(gate|router)\b.*weight$", 2.0), (r"shared_expert_gate", 2.0))


def module_of(row: BlockRow, kind: str) -> Any:
    """Returns the family's `modeling` or `configuration` module."""
    return importlib.import_module(f"transformers.models.{row.family}.{kind}_{row.family}")


def make_config(row: BlockRow) -> Any:
    """Returns the row's config, with eager experts."""
    config = getattr(module_of(row, "configuration"), row.config)(**{**row.sizes, **row.options})
    config._experts_implementation = "eager"
    return config


def make_input(row: BlockRow, seed: int, batch: int = 2, seq: int = 11) -> Tensor:
    """Returns hidden states for the row's block, float32 [batch, seq, hidden]."""
    return torch.randn(batch, seq, row.hidden_size, generator=torch.Generator().manual_seed(seed))


def make_block(row: BlockRow, seed: int) -> nn.Module:
    """Returns the row's block in float32 and eval mode; equal seeds give equal parameters. The global generator is
    unchanged.
    """
    config = make_config(row)
    with torch.random.fork_rng(devices=[]):
        block = getattr(module_of(row, "modeling"), row.block)(
            getattr(config, row.subconfig) if row.subconfig else config, *row.args
        )
    randomise(block.float(), seed)
    return block.get_submodule(row.path).eval()


def randomise(module: nn.Module, seed: int) -> None:
    """Fills every parameter and every saved buffer with random values; other buffers, such as rotary frequencies, are
    computed from the config.

    A tensor's values depend on the seed, its name and its shape: variants of a block have the same values.
    """
    saved = module.state_dict().keys()
    norms = {name for name, child in module.named_modules() if "norm" in type(child).__name__.lower()}
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name not in saved:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            tensor.copy_(draw(name, tensor, generator, norms, module))


def draw(name: str, tensor: Tensor, generator: torch.Generator, norms: set[str], module: nn.Module) -> Tensor:
    """Returns new values for one tensor of a module."""
    if not tensor.is_floating_point():
        return experts_of_tokens(tensor, int(module.get_submodule(name.rpartition(".")[0]).num_experts), generator)
    if name.rpartition(".")[0] in norms and not name.endswith("bias"):
        return tensor + 0.4 * (torch.rand(tensor.shape, generator=generator) - 0.5)
    for pattern, middle, half_width in DRAWS:
        if re.search(pattern, name):
            return middle + half_width * (2 * torch.rand(tensor.shape, generator=generator) - 1)
    gain = next((gain for pattern, gain in GAINS if re.search(pattern, name)), 1.0)
    fan_in = tensor.shape[-1] if tensor.ndim > 1 else 1
    return gain / fan_in**0.5 * torch.randn(tensor.shape, generator=generator)


def experts_of_tokens(table: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Returns different experts in each row of a table such as tid2eid [vocabulary, top_k]."""
    return torch.rand(table.shape[0], num_experts, generator=generator).argsort(dim=-1)[:, : table.shape[1]]
