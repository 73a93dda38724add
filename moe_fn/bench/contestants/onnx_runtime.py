"""Contestant ONNX Runtime: a model with its contrib op com.microsoft.MoE (and, for the layer, the gate's product).

QMoE where experts are quantized. There is no bfloat16: x is converted to float32, untimed. QMoE takes any routing, as a
row of weights for each token; without one its weights always sum to one, whatever normalize_routing_weights is.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    interleaved,
    missing,
    only_on_cpu_forward,
    out_in,
    refuses_weight_on_input,
)
from moe_fn.bench.contestants.onnx_quantized import attributes_of_quant, codes_and_scales, refuses_quant
from moe_fn.bench.contestants.routers import is_softmax, renormalizes
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.records import RouterWeights

# The op's attributes. Its swiglu is gate * sigmoid(alpha * gate) * (up + beta), rows interleaved (swiglu_fusion=1); its
# gelu differs from torch's by 1e-4, so it is not used.
_ATTRIBUTES: dict[str, dict[str, object]] = {
    "silu": {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0},
    "swigluoai": {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.702,
        "activation_beta": 1.0,
        "swiglu_limit": 7.0,
    },
    "silu_no_mul": {"activation_type": "silu"},
    "relu_no_mul": {"activation_type": "relu"},
}
_DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.uint8: "UINT8"}


def _dtype(problem: Problem) -> torch.dtype:
    return torch.float32 if problem.dtype == torch.bfloat16 else problem.dtype


def _weights(problem: Problem) -> dict[str, Tensor]:
    config, weights = problem.config, problem.weights
    mixes = activation_name(config) in ("silu", "swigluoai") and config.gate_up_layout == "packed"
    found = {"gate_up_bias": weights.gate_up_bias, "down_bias": weights.down_bias}
    if config.quant is None:
        found |= {"gate_up": out_in(config, weights.gate_up), "down": out_in(config, weights.down)}
    else:
        found |= codes_and_scales(config.quant, weights)
    for name, tensor in found.items():
        if mixes and name.startswith("gate_up") and tensor is not None:
            found[name] = interleaved(tensor)
    if problem.part == "layer":
        router = weights.router or RouterWeights()
        found |= {"gate": None if router.gate is None else router.gate.t().contiguous(), "gate_bias": router.bias}
    dtype = _dtype(problem)
    return {
        name: t if t.dtype == torch.uint8 else t.to(dtype).contiguous() for name, t in found.items() if t is not None
    }


def _model(problem: Problem, weights: dict[str, Tensor]) -> Any:
    onnx, helper = importlib.import_module("onnx"), importlib.import_module("onnx.helper")
    config = problem.config
    dtype = getattr(onnx.TensorProto, _DTYPES[_dtype(problem)])
    inputs = {"x": config.hidden_size} | dict.fromkeys(_routing_inputs(problem), config.num_experts)
    nodes = []
    if problem.part == "layer":
        product = "product" if "gate_bias" in weights else "logits"
        nodes.append(helper.make_node("MatMul", ["x", "gate"], [product]))
        if "gate_bias" in weights:
            nodes.append(helper.make_node("Add", ["product", "gate_bias"], ["logits"]))
    biases = [name if name in weights else "" for name in ("gate_up_bias", "down_bias")]
    attributes = _ATTRIBUTES[activation_name(config) or ""] | {"k": config.top_k}
    attributes["normalize_routing_weights"] = int(renormalizes(config.router))
    op, names = "MoE", ["x", "logits", "gate_up", biases[0], "down", biases[1]]
    if config.quant is not None:
        attributes |= attributes_of_quant(config.quant)
        op, names = "QMoE", ["x", "logits", "gate_up", "gate_up_scale", biases[0], "down", "down_scale", biases[1]]
        if "routing_weights" in inputs:
            attributes["normalize_routing_weights"] = 0
            names += [""] * 6 + ["routing_weights"]  # 6: a third product, and zero points
    nodes.append(helper.make_node(op, names, ["y"], domain="com.microsoft", **attributes))
    graph = helper.make_graph(
        nodes,
        "moe",
        [helper.make_tensor_value_info(name, dtype, ["tokens", width]) for name, width in inputs.items()],
        [helper.make_tensor_value_info("y", dtype, ["tokens", config.hidden_size])],
        [_outside(onnx, name, tensor) for name, tensor in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _routing_inputs(problem: Problem) -> tuple[str, ...]:
    """Names of the graph's inputs [T, E], besides x."""
    if problem.part == "layer":
        return ()
    return ("logits",) if problem.config.quant is None else ("logits", "routing_weights")


def _feeds(problem: Problem, token_input: TokenInput) -> dict[str, Tensor]:
    """Values of the inputs. Where the op takes routing weights, the logits are 1 for chosen experts, else 0."""
    values, routing = {"x": token_input.x, "logits": token_input.logits}, token_input.routing
    if problem.config.quant is not None and problem.part == "experts":
        zeros = torch.zeros(token_input.logits.shape)
        values["logits"] = zeros.scatter(1, routing.expert_ids, 1.0)
        values["routing_weights"] = zeros.scatter(1, routing.expert_ids, routing.weights.float())
    names = ("x", *_routing_inputs(problem))
    return {name: values[name].to(_dtype(problem)) for name in names}


def _outside(onnx: Any, name: str, tensor: Tensor) -> Any:
    """An initializer whose values are passed when the session is made: a model file is limited to 2 GB."""
    dtype = getattr(onnx.TensorProto, _DTYPES[tensor.dtype])
    proto = onnx.TensorProto(name=name, data_type=dtype, dims=tensor.shape, data_location=onnx.TensorProto.EXTERNAL)
    location = proto.external_data.add()
    location.key, location.value = "location", "memory"
    return proto


def _build(problem: Problem) -> Layer:
    runtime = importlib.import_module("onnxruntime")
    weights = _weights(problem)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    # Otherwise its threads keep spinning while the next contestant is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = [runtime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in weights.values()]
    options.add_external_initializers(list(weights), values)
    session = runtime.InferenceSession(
        _model(problem, weights).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(feeds: dict[str, Any]) -> Tensor:
        return torch.from_numpy(session.run(None, feeds)[0])

    def bind(token_input: TokenInput) -> Run:
        return functools.partial(run, {name: tensor.numpy() for name, tensor in _feeds(problem, token_input).items()})

    return Layer(bind=bind)


def _refuses(problem: Problem, tokens: int) -> str | None:
    config = problem.config
    if config.quant is None and problem.dtype not in _DTYPES:
        return "its MoE op is for f32 and f16"
    if config.quant is not None and (reason := refuses_quant(config)) is not None:
        return reason
    takes_weights = config.quant is not None and problem.part == "experts"
    if not takes_weights and not is_softmax(config.router):
        return "its MoE op routes by softmax and top-k only"
    if not takes_weights and config.quant is not None and not renormalizes(config.router):
        return "the weights of its QMoE op always sum to one"
    if activation_name(config) not in _ATTRIBUTES:
        return f"its MoE op does not have this activation, {config.activation}"
    return only_on_cpu_forward(problem) or refuses_weight_on_input(problem)


ONNX_RUNTIME = Contestant(
    name="onnxruntime",
    installed=functools.partial(missing, "onnxruntime", "onnx"),
    refuses=_refuses,
    build=_build,
    takes="both",
    copies=2,  # interleaved, and packed by the session
    devices=("cpu",),
    package="onnxruntime",
)
