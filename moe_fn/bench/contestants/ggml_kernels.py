"""Contestant ggml (llama.cpp): MUL_MAT_ID, swiglu, MUL_MAT_ID, weighted sum, as in llama.cpp's graph of experts.

The library is that of ggml-py or llama-cpp-python, which compile it on installation. The codes are those of the
problem, in ggml's blocks of 32:

    q4_0   float16 scale, 16 bytes: byte i has input i in its low half and input i + 16 in its high half, zero 8
    q8_0   float16 scale, 32 bytes
    mxfp4  e8m0 scale, 16 bytes as in q4_0, e2m1

It always rounds the inputs of both products to int8 in groups of 32. Its other floats are float32.
"""

import functools

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    only_on_cpu_forward,
    packed,
    refuses_weight_on_input,
)
from moe_fn.bench.contestants.ggml_library import Library, found_library, loaded
from moe_fn.bench.contestants.routers import refuses_router, routing_of
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.config import QuantConfig
from moe_fn.quant.codes import codes_of
from moe_fn.quant.numbers import pack_halves, unpack_halves

_BLOCK = 32
_F32, _I32 = 0, 26  # enum ggml_type
# (scheme, granularity, group size) -> ggml's type, and whether llama.cpp repacks it on x86
_TYPES = {
    ("int4", "group", _BLOCK): (2, True),
    ("int8", "channel", None): (8, False),
    ("mxfp4", "group", _BLOCK): (39, True),
}


def _type(quant: QuantConfig) -> tuple[int, bool] | None:
    return None if quant.zero_points else _TYPES.get((quant.scheme, quant.granularity, quant.group_size))


def blocks_of(quant: QuantConfig, codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., in / codes in a byte] and scales [..., groups] as ggml's blocks: uint8 [..., in / 32, bytes of a
    block].
    """
    if quant.row.bits == 8:
        values = codes.unflatten(-1, (-1, _BLOCK)).view(torch.uint8)
        scale = scale.expand(*scale.shape[:-1], values.shape[-2])
    else:
        halves = unpack_halves(codes).unflatten(-1, (-1, 2, _BLOCK // 2))
        values = pack_halves(halves.transpose(-1, -2).flatten(-2))
    if scale.dtype != torch.uint8:
        scale = scale.to(torch.float16)
    return torch.cat([scale.unsqueeze(-1).contiguous().view(torch.uint8), values], -1)


def _blocks(problem: Problem, quant: QuantConfig, name: str) -> Tensor:
    """The blocks of all experts, made one expert at a time."""
    stored, made = codes_of(problem.weights, name), []
    for codes, scale in zip(stored.codes, stored.scale, strict=True):
        if name == "gate_up" and problem.config.gate_up_layout == "interleaved":
            codes, scale = packed(codes.unsqueeze(0))[0], packed(scale.unsqueeze(0))[0]
        made.append(blocks_of(quant, codes, scale))
    return torch.stack(made)


def _build(problem: Problem) -> Layer:
    config, quant = problem.config, problem.config.quant
    kind = None if quant is None else _type(quant)
    path = found_library()
    if quant is None or kind is None or path is None:
        raise ValueError("ggml: expected quantized experts, and a library")
    lib = loaded(path)
    backend = lib.call("ggml_backend_cpu_init")
    lib.call("ggml_backend_cpu_set_n_threads", backend, problem.threads)
    context = lib.context()
    shapes = {
        "gate_up": (config.hidden_size, problem.weights.gate_up.shape[1]),
        "down": (config.intermediate_size, config.hidden_size),
    }
    matrices = {
        name: lib.call("ggml_new_tensor_3d", context, kind[0], *shape, config.num_experts)
        for name, shape in shapes.items()
    }
    buffers = lib.repacking(backend) if kind[1] else lib.call("ggml_backend_get_default_buffer_type", backend)
    if not lib.call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffers):
        raise MemoryError("ggml: no memory for the weights")
    for name, matrix in matrices.items():
        blocks = _blocks(problem, quant, name)
        lib.call("ggml_backend_tensor_set", matrix, blocks.data_ptr(), 0, blocks.nbytes)
    graph = functools.lru_cache(maxsize=1)(
        functools.partial(_graph, lib, backend, problem, matrices["gate_up"], matrices["down"])
    )

    def run(token_input: TokenInput, x: Tensor) -> Tensor:
        routing, y = routing_of(problem, token_input), torch.empty_like(x)
        compute, tensors = graph(len(x))
        values = {
            "x": x,
            "ids": routing.expert_ids.to(torch.int32).contiguous(),
            "weights": routing.weights.float().contiguous(),
        }
        for name, value in values.items():
            lib.call("ggml_backend_tensor_set", tensors[name], value.data_ptr(), 0, value.nbytes)
        lib.call("ggml_backend_graph_compute", backend, compute)
        lib.call("ggml_backend_tensor_get", tensors["y"], y.data_ptr(), 0, y.nbytes)
        return y

    def bind(token_input: TokenInput) -> Run:
        return functools.partial(run, token_input, token_input.x.float())

    return Layer(bind=bind)


def _graph(
    lib: Library, backend: int, problem: Problem, gate_up: int, down: int, tokens: int
) -> tuple[int, dict[str, int]]:
    """The graph of y for this number of tokens, and its input tensors and y. Dims are ggml's, innermost first."""
    config, top_k = problem.config, problem.config.top_k
    context = lib.context()
    call = functools.partial(lib.call_in, context)
    tensors = {
        "x": call("ggml_new_tensor_3d", _F32, config.hidden_size, 1, tokens),
        "ids": call("ggml_new_tensor_2d", _I32, top_k, tokens),
        "weights": call("ggml_new_tensor_3d", _F32, 1, top_k, tokens),
    }
    for tensor in tensors.values():
        lib.call("ggml_set_input", tensor)
    rows = call("ggml_mul_mat_id", gate_up, tensors["x"], tensors["ids"])
    rows = call("ggml_mul_mat_id", down, call("ggml_swiglu", rows), tensors["ids"])
    rows = call("ggml_mul", rows, tensors["weights"])
    of_row = config.hidden_size * 4
    views = [
        call("ggml_view_2d", rows, config.hidden_size, tokens, top_k * of_row, slot * of_row) for slot in range(top_k)
    ]
    y = functools.reduce(functools.partial(call, "ggml_add"), views)
    if top_k == 1:
        y = call("ggml_cont", y)
    lib.call("ggml_set_output", y)
    graph = call("ggml_new_graph")
    lib.call("ggml_build_forward_expand", graph, y)
    allocator = lib.call("ggml_gallocr_new", lib.call("ggml_backend_get_default_buffer_type", backend))
    if not lib.call("ggml_gallocr_alloc_graph", allocator, graph):
        raise MemoryError(f"ggml: no memory for {tokens} tokens")
    return graph, tensors | {"y": y}


def _refuses(problem: Problem, tokens: int) -> str | None:
    config, quant = problem.config, problem.config.quant
    if quant is None or _type(quant) is None:
        return "supports q4_0, q8_0 and mxfp4 here, not these codes and scales"
    if problem.dtype != torch.bfloat16 and quant.activations is None:
        return f"rounds inputs to int8, which is too coarse for {problem.dtype}"
    if quant.activations is not None and quant.activations.scheme != "int8":
        return "rounds inputs to int8"
    if activation_name(config) != "silu" or problem.weights.gate_up_bias is not None:
        return "supports gated silu without biases here"
    if config.hidden_size % _BLOCK or config.intermediate_size % _BLOCK:
        return f"its blocks are {_BLOCK} inputs"
    return only_on_cpu_forward(problem) or refuses_weight_on_input(problem) or refuses_router(problem)


def _installed() -> str | None:
    return "not installed: ggml-py or llama-cpp-python" if found_library() is None else None


GGML = Contestant(
    name="ggml", installed=_installed, refuses=_refuses, build=_build, takes="codes", copies=3, devices=("cpu",)
)
