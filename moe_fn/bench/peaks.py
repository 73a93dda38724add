"""Peak memory of a layer on a CPU besides weights and inputs, by formulas; `property_tests/test_peaks.py` measures it.

R = tokens * top_k rows, H hidden_size, I intermediate_size, E experts, s bytes of an element, f bytes of an accumulated
one (4), Y bytes of the threads' sums, f for each token and some columns. Without biases, all ids on experts, silu,
gated. "or" means the larger one.

    native, forward   R I s + T H s + Y                       hidden rows, the result
        codes         R I s + T H s + (Y or T H c)            hidden rows with the scales and sums of some schemes; rows
                                                              of x as operands of codes: c is 1 where inputs are
                                                              rounded, otherwise s
        chunks        3 T H s, or 2 T H s + one chunk         x with a spare row, results of chunks, their concatenation
        opaque chunks T H s + one chunk
    native, step      2 R I s saved (recompute: 0) + T H s + the backward pass, which is
                      3 R I s + E H I s, or                 gradient of hidden rows, weighted activations, d down
                      2 R I s + T H s + Y + 3 E H I s       gradient of hidden rows, gradients; packed rows of the first
                                                            (2 R I s more unless 2 I s is a multiple of 64 bytes)
        chunks        4 T H s + 3 E H I f + the step of a chunk, or 4 T H s + 3 E H I (2 f + s), or 5 T H s + 3 E H I f
        opaque chunks T H (s + f) + 3 E H I f + the step of a chunk      sums of gradients have f bytes per element
    stages, forward   R H s + 4 R I f,  or 2 R H (s + f) + T H s
    stages, step      see `step_peak`
    prepare_weights   4 E H I s                               panels of gate_up and their copy in huge pages

Indices take 32 R bytes. Not counted: the router, which frees about 40 bytes per entry of logits before the experts run,
and a thread's packed rows and panels, at most 2 MB.
"""

from dataclasses import replace

import torch

from moe_fn.config import MoEConfig, QuantConfig

PANEL = 32  # output columns of a panel
CHUNK = 16  # a packed row is rounded up to a multiple of so many floats
_INDICES = 32  # bytes per row: its id, weight, token and positions


def forward_peak(config: MoEConfig, tokens: int, dtype: torch.dtype, threads: int = 1) -> int:
    """Peak bytes of moe_forward without gradients, including its result.

    config.backend is "native" or "torch"; with "native", weights may be quantized, and chunk_tokens may be given.

    >>> config = MoEConfig(num_experts=8, top_k=4, hidden_size=256, intermediate_size=512, backend="native")
    >>> forward_peak(config, 8192, torch.float32) / 1e6  # hidden rows 67.1, result 8.4, sums 4.2, indices 1.0
    80.740352
    """
    _check(config, tokens)
    if config.chunk_tokens is not None:
        whole, of_chunk = tokens * config.hidden_size * dtype.itemsize, forward_peak(*_chunk(config), dtype, threads)
        indices = tokens * config.top_k * _INDICES
        # The op writes into its result. Otherwise x has a spare row, and results of chunks exist besides the last
        # chunk, or besides their concatenation after it.
        return whole + of_chunk if config.opaque else indices + max(2 * whole + of_chunk, 3 * whole)
    rows, size = tokens * config.top_k, dtype.itemsize
    wide, hidden, inner = _wide(dtype), config.hidden_size, config.intermediate_size
    if config.backend == "torch":
        activation = rows * hidden * size + 4 * rows * inner * wide
        combination = 2 * rows * hidden * (size + wide) + tokens * hidden * size
        return rows * _INDICES + max(activation, combination)
    result, sums = tokens * hidden * size + rows * _INDICES, _sums(config, tokens, threads)
    if config.quant is None:
        return result + sums + rows * _rounded(inner * size)
    of_x, of_hidden = (_coded_row(config.quant, inputs, dtype) for inputs in (hidden, inner))
    return result + max(sums, tokens * of_x) + rows * max(of_hidden, _rounded(inner * size))


def step_peak(config: MoEConfig, tokens: int, dtype: torch.dtype, threads: int = 1) -> int:
    """Peak bytes of a forward and backward pass, including the result and the gradients of x, logits, gate_up and down.

        native   see the table of this module
        stages   T H s + R H (s + 4 f) + R I (3 f + s) in the gradients of the sum, or
                 T H s + 2 R H s + R I (5 f, or 6 f where s < f) + E H I s in those of the activation

    >>> config = MoEConfig(num_experts=8, top_k=4, hidden_size=256, intermediate_size=512, backend="native",
    ...     recompute=True)
    >>> step_peak(config, 8192, torch.float32) / 1e6
    225.44384
    """
    _check(config, tokens)
    if config.quant is not None or (config.chunk_tokens is not None and config.backend == "torch"):
        raise ValueError(
            "step_peak: quant, or chunk_tokens with backend='torch'; expected neither, since there is no formula for "
            "such a step"
        )
    if config.chunk_tokens is not None:
        return _step_in_chunks(config, tokens, dtype, threads)
    rows, size, wide = tokens * config.top_k, dtype.itemsize, _wide(dtype)
    hidden, inner, whole = config.hidden_size, config.intermediate_size, tokens * config.hidden_size * dtype.itemsize
    weights = 3 * config.num_experts * hidden * inner * size
    if config.backend == "torch":
        of_sum = rows * hidden * (size + 4 * wide) + rows * inner * (3 * wide + size)
        of_activation = (
            2 * rows * hidden * size + rows * inner * (5 * wide + (wide if size < wide else 0)) + weights // 3
        )
        return rows * _INDICES + whole + max(of_sum, of_activation)
    kept = 0 if config.recompute else 2 * rows * inner * size
    of_hidden = 2 * rows * inner * size
    base = kept + of_hidden + rows * _up(inner, PANEL) // PANEL * 4 + 2 * whole + rows * _INDICES
    packed = 0 if _rounded(2 * inner * size) == 2 * inner * size else rows * _rounded(2 * inner * size)
    return base + max(of_hidden // 2 + weights // 3, weights + _sums(config, tokens, threads) + packed)


def _step_in_chunks(config: MoEConfig, tokens: int, dtype: torch.dtype, threads: int) -> int:
    """Peak of a step in chunks: sums of the weights' gradients, a chunk, and the concatenations of chunks."""
    chunk = step_peak(
        replace(config, chunk_tokens=None, opaque=False, recompute=True), config.chunk_tokens or 0, dtype, threads
    )
    numbers, size, wide = (
        3 * config.num_experts * config.hidden_size * config.intermediate_size,
        dtype.itemsize,
        _wide(dtype),
    )
    whole, sums, cast = tokens * config.hidden_size * size, numbers * wide, numbers * size if size < wide else 0
    indices = 2 * tokens * config.top_k * _INDICES
    if config.opaque:  # the result, and sums of gradients of x and weights; at the end their copies in narrower dtypes
        kept = whole + whole // size * wide + sums
        return indices + kept + max(chunk, whole + cast if cast else 0)
    # The result, x and its gradient with a spare row, and gradients of chunks, which are concatenated at the end.
    # Sums in a wider dtype cast their addends, that of down last.
    added = 2 * sums + numbers * size + (sums // 3 if cast else 0)
    return indices + max(4 * whole + max(sums + chunk, added), 5 * whole + sums + cast)


def prepare_peak(config: MoEConfig, dtype: torch.dtype) -> int:
    """Peak bytes of prepare_weights besides the plain weights: the result, and one matrix in panels that is not yet in
    huge pages.

    >>> config = MoEConfig(num_experts=8, top_k=4, hidden_size=256, intermediate_size=512)
    >>> prepare_peak(config, torch.float32) == 4 * 8 * (2 * 512 * 256 + 2 * 512 * 256)
    True
    """
    down = config.num_experts * config.hidden_size * config.intermediate_size * dtype.itemsize
    return max(2 * 2 * down, 2 * down + 2 * down)


def _check(config: MoEConfig, tokens: int) -> None:
    if config.backend not in ("native", "torch"):
        raise ValueError(
            f"peaks: MoEConfig.backend is {config.backend!r}; expected 'native' or 'torch', whose peaks differ"
        )
    if tokens < 0:
        raise ValueError(f"peaks: tokens is {tokens}; expected 0 or more")


def _chunk(config: MoEConfig) -> tuple[MoEConfig, int]:
    return replace(config, chunk_tokens=None), config.chunk_tokens or 0


def _wide(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def _rounded(size: int) -> int:
    """Bytes of a packed row."""
    return _up(size, 4 * CHUNK)


def _sums(config: MoEConfig, tokens: int, threads: int) -> int:
    """Y: each thread sums the outputs of all tokens for some columns at a time, in float32."""
    panels = _up(config.hidden_size, PANEL) // PANEL
    each = min(max(panels // (2 * threads), 1), 8)
    tasks = min(panels, _up(_up(panels, each) // each, threads))
    return threads * tokens * _up(panels, tasks) // tasks * PANEL * 4


def _coded_row(quant: QuantConfig, inputs: int, dtype: torch.dtype) -> int:
    """Bytes of a row as operands of products with codes, as int8 where inputs are rounded, with the scales and sums
    that some schemes need.
    """
    as_bytes = quant.activations is not None
    has_sums = as_bytes or quant.zero_points or (quant.scheme == "int4" and dtype == torch.bfloat16)
    tile = quant.tile[1] or inputs
    spans = _up(inputs, tile) // tile
    return _rounded(inputs * (1 if as_bytes else dtype.itemsize)) + (_rounded(4 * (1 + spans)) if has_sums else 0)
