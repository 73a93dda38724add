"""The most memory that a layer takes beside weights and inputs, on a CPU, as formulas; `property_tests/test_peaks.py`
measures them.

R = tokens * top_k rows, H hidden_size, I intermediate_size, E experts, s bytes of an element, f of an accumulated one
(4), Y what the threads sum up in, f bytes for each of some columns of every token. Without biases, all ids on experts,
silu, gated.

    native, forward   R I s + T H s + Y                       hidden rows, the result
        codes         and R I s + T H s once more rows as the decoded weights take them; s = 1 where inputs are rounded
        chunks        3 T H s, or 2 T H s and one chunk x with a spare row, results of chunks, the same laid end to end
        opaque chunks T H s and one chunk
    native, step      2 R I s kept (recompute: 0), and T H s, and in the backward pass 5 R I s + T H s + Y, or if that
                      is more 3 R I s + T H s + 3 E H I s d hidden, weighted activations, rows of d hidden again,
                      gradients
        chunks        4 T H s + 3 E H I f + the step of a chunk, or 4 T H s + 3 E H I (2 f + s), or 5 T H s + 3 E H I f
        opaque chunks T H (s + f) + 3 E H I f + the step of a chunk      sums of gradients are of f bytes each
    stages, forward   R H s + 4 R I f,  or 2 R H (s + f) + T H s
    stages, step      in `step_peak`
    prepare_weights   4 E H I s what is laid, and once more in huge pages, gate_up before down

Indices take 32 R bytes. The router, whose numbers are gone before experts begin, takes some 40 bytes an entry of
logits, and a thread's packed rows and panels at most 2 MB: both are left out.
"""

from dataclasses import replace

import torch

from moe_fn.config import MoEConfig, QuantConfig

PANEL = 32  # output columns of a panel
CHUNK = 16  # floats that a packed row is rounded up to
_INDICES = 32  # bytes of a row: its id, weight, token and places


def forward_peak(config: MoEConfig, tokens: int, dtype: torch.dtype, threads: int = 1) -> int:
    """Bytes at the peak of moe_forward without gradients, its result among them.

    config.backend is "native" or "torch"; with "native" weights may be codes, and chunk_tokens may be given.

    >>> config = MoEConfig(num_experts=8, top_k=4, hidden_size=256, intermediate_size=512, backend="native")
    >>> forward_peak(config, 8192, torch.float32) / 1e6  # hidden rows 67.1, result 8.4, sums 4.2, indices 1.0
    80.740352
    """
    _check(config, tokens)
    if config.chunk_tokens is not None:
        whole, of_chunk = tokens * config.hidden_size * dtype.itemsize, forward_peak(*_chunk(config), dtype, threads)
        indices = tokens * config.top_k * _INDICES
        # The op fills its result. Else x has a spare row, and results are beside the last chunk, or laid end to end
        # after it.
        return whole + of_chunk if config.opaque else indices + max(2 * whole + of_chunk, 3 * whole)
    rows, size = tokens * config.top_k, dtype.itemsize
    wide, hidden, inner = _wide(dtype), config.hidden_size, config.intermediate_size
    if config.backend == "torch":
        activation = rows * hidden * size + 4 * rows * inner * wide
        combination = 2 * rows * hidden * (size + wide) + tokens * hidden * size
        return rows * _INDICES + max(activation, combination)
    result = tokens * hidden * size + _sums(config, tokens, threads) + rows * _INDICES
    return (
        result
        + rows * _rounded(inner * size)
        + (0 if config.quant is None else _coded(config, config.quant, tokens, dtype))
    )


def step_peak(config: MoEConfig, tokens: int, dtype: torch.dtype, threads: int = 1) -> int:
    """Bytes at the peak of a forward and backward pass, the result and the gradients of x, logits, gate_up and down
    among them.

        native   as above
        stages   T H s + R H (s + 4 f) + R I (3 f + s), in the gradients of the sum;  in those of the activation
                 T H s + 2 R H s + R I (5 f, or 6 f where s < f) + E H I s

    >>> config = MoEConfig(num_experts=8, top_k=4, hidden_size=256, intermediate_size=512, backend="native",
    ...     recompute=True)
    >>> step_peak(config, 8192, torch.float32) / 1e6
    359.661568
    """
    _check(config, tokens)
    if config.quant is not None or (config.chunk_tokens is not None and config.backend == "torch"):
        raise ValueError(
            "step_peak: quant, or chunk_tokens with backend='torch'; expected neither, for there is no formula of such "
            "a step"
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
    both = 3 * rows * inner * size + rows * _up(inner, PANEL) // PANEL * 4 + 2 * whole + rows * _INDICES
    return kept + both + max(rows * _rounded(2 * inner * size) + _sums(config, tokens, threads), weights)


def _step_in_chunks(config: MoEConfig, tokens: int, dtype: torch.dtype, threads: int) -> int:
    """Sums of the weights' gradients, and of everything else as much as a chunk; what x, results and gradients are laid
    into.
    """
    chunk = step_peak(
        replace(config, chunk_tokens=None, opaque=False, recompute=True), config.chunk_tokens or 0, dtype, threads
    )
    numbers, size, wide = (
        3 * config.num_experts * config.hidden_size * config.intermediate_size,
        dtype.itemsize,
        _wide(dtype),
    )
    whole, sums, cast = tokens * config.hidden_size * size, numbers * wide, numbers * size if size < wide else 0
    beside = 2 * tokens * config.top_k * _INDICES
    if config.opaque:  # the result, gradients of x and weights in sums; at the end once more where they are narrower
        kept = whole + whole // size * wide + sums
        return beside + kept + max(chunk, whole + cast if cast else 0)
    # The result, x and its gradient with a spare row, and gradients of chunks, which are laid end to end at the end.
    # Sums of other dtypes cast what they add, down last.
    added = 2 * sums + numbers * size + (sums // 3 if cast else 0)
    return beside + max(4 * whole + max(sums + chunk, added), 5 * whole + sums + cast)


def prepare_peak(config: MoEConfig, dtype: torch.dtype) -> int:
    """Bytes at the peak of prepare_weights beside the plain weights: the result, and one matrix that is laid but not
    yet in huge pages.

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
    """Y: every thread sums all tokens' outputs for some columns at a time, in float32."""
    panels = _up(config.hidden_size, PANEL) // PANEL
    each = min(max(panels // (2 * threads), 1), 8)
    tasks = min(panels, _up(_up(panels, each) // each, threads))
    return threads * tokens * _up(panels, tasks) // tasks * PANEL * 4


def _coded(config: MoEConfig, quant: QuantConfig, tokens: int, dtype: torch.dtype) -> int:
    """Rows of x and hidden rows as decoded weights take them, in bytes where inputs are rounded; and what codes need
    beside.
    """
    as_bytes = quant.activations is not None
    beside = as_bytes or quant.zero_points or (quant.scheme == "int4" and dtype == torch.bfloat16)

    def row(inputs: int) -> int:
        tile = quant.tile[1] or inputs
        spans = _up(inputs, tile) // tile
        return _rounded(inputs * (1 if as_bytes else dtype.itemsize)) + (_rounded(4 * (1 + spans)) if beside else 0)

    return tokens * row(config.hidden_size) + tokens * config.top_k * row(config.intermediate_size)
