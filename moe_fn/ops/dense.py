"""Products of all tokens with one matrix, for gates, shared experts and latent spaces."""

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig
from moe_fn.ops.grouped_matmul import GROUPED
from moe_fn.torch_compat import autocast_around_graph


def dense_product(config: MoEConfig, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, [T, K] and [N, K] -> [T, N]; with config.batch_invariant a row's bits do not depend on T.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1)
    >>> dense_product(config, torch.ones(1, 2), torch.ones(3, 2))
    tensor([[2., 2., 2.]])
    """
    if config.batch_invariant or _loses_digits(x):
        return product_of_all(config, x, weight)
    return x @ weight.t()


def _loses_digits(x: Tensor) -> bool:
    """Whether x is float32 in a graph compiled under autocast: AOTAutograd would trace a product's gradient, but not
    the product, in autocast's dtype.
    """
    return torch.compiler.is_compiling() and x.dtype == torch.float32 and autocast_around_graph(x.device.type)


def product_of_all(config: MoEConfig, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T as a grouped product with one expert that has all rows."""
    ends = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    return GROUPED[backend_of(config, x)].matmul(x, weight.unsqueeze(0), ends, True, invariant=config.batch_invariant)
