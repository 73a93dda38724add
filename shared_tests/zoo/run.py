"""Runs a block of the zoo with its extra inputs, and reads the choice of its router."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shared_tests.zoo.row import BlockResult, BlockRow

ExtraInputs = dict[str, Tensor]
Chosen = tuple[Tensor | None, Tensor | None]  # expert ids and weights [tokens, top_k]


def run_block(row: BlockRow, block: nn.Module, x: Tensor) -> BlockResult:
    """Returns the block's output for x [batch, seq, hidden], without the residual, and the chosen experts. Extra inputs
    depend on x's shape only.
    """
    seen: dict[str, Any] = {}
    hooks = [
        block.get_submodule(name).register_forward_hook(_remember(seen, name))
        for name in row.router.split()
        if row.routing != "none"
    ]
    try:
        inputs, output = CALLERS[row.takes](block, x.clone())  # some blocks change their input in place
    finally:
        for hook in hooks:
            hook.remove()
    y = output[0] if isinstance(output, tuple) else output
    expert_ids, weights = READERS[row.routing](row, block, seen, inputs)
    extras = {key: inputs.pop(key) for key in tuple(inputs) if key not in BlockResult.__dataclass_fields__}
    routed = seen.get(row.router)
    if row.routing == "standard" and len(routed) > 3:
        extras["router_extra"] = routed[3]
    return BlockResult(y.reshape(x.shape), expert_ids, weights, **inputs, extras=extras)


def _remember(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = output

    return hook


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(x[..., 0].numel())


def _hidden(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    return {}, block(x)


def _flat_output(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    """ernie4_5_vl_moe's banks: hidden states of any shape, a flat output."""
    return {}, block(x.reshape(-1))


def _input_ids(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    token_ids = torch.randint(block.gate.tid2eid.shape[0], x.shape[:2], generator=_generator(x))
    return {"token_ids": token_ids}, block(x, input_ids=token_ids)


def _router_states(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    states = torch.randn(*x.shape[:2], block.gate.router_hidden_size, generator=_generator(x))
    return {"router_states": states}, block(x, states)


def _modality(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    modality = torch.randint(2, x.shape[:2], generator=_generator(x))
    return {"modality": modality}, block(x, moe_mm_token_type_ids=modality)


def _gemma_layer(layer: Any, residual: Tensor) -> tuple[ExtraInputs, Any]:
    """The Mixture-of-Experts branch of a gemma4 or diffusion_gemma layer, with the lines of its forward from the
    residual on.
    """
    hidden_states_flat = residual.reshape(-1, residual.shape[-1])
    _, top_k_weights, top_k_index = layer.router(hidden_states_flat)
    experts_input = layer.pre_feedforward_layernorm_2(hidden_states_flat)
    y = layer.experts(experts_input, top_k_index, top_k_weights).reshape(residual.shape)
    return {
        "experts_input": experts_input.reshape(residual.shape),
        "after_norm": layer.post_feedforward_layernorm_2(y),
    }, y


def _heads(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    """vitpose_backbone: the data set's index, one for each sequence, selects the head."""
    return {"dataset_index": (indices := torch.arange(x.shape[0]) % block.num_experts)}, block(x, indices)


def _attention(block: Any, x: Tensor) -> tuple[ExtraInputs, Any]:
    """jetmoe's mixture of attention heads without the attention: queries in, the first head's width out."""
    queries, _, where = block.map(x)
    return {}, block.reduce(queries, where)


CALLERS: dict[str, Callable[[Any, Tensor], tuple[ExtraInputs, Any]]] = {
    "hidden": _hidden,
    "flat_output": _flat_output,
    "input_ids": _input_ids,
    "router_states": _router_states,
    "modality": _modality,
    "gemma_layer": _gemma_layer,
    "heads": _heads,
    "attention": _attention,
}


def _standard(row: BlockRow, block: Any, seen: dict[str, Any], inputs: ExtraInputs) -> Chosen:
    _, weights, expert_ids = seen[row.router][:3]
    return expert_ids, weights


def _llama4(row: BlockRow, block: Any, seen: dict[str, Any], inputs: ExtraInputs) -> Chosen:
    """Scores are 0 except for the chosen experts."""
    weights, expert_ids = seen[row.router][0].topk(block.top_k)
    return expert_ids, weights


def _dbrx(row: BlockRow, block: Any, seen: dict[str, Any], inputs: ExtraInputs) -> Chosen:
    weights, expert_ids = block.route_tokens_to_experts(seen[row.router])
    return expert_ids, weights


def _jetmoe(row: BlockRow, block: Any, seen: dict[str, Any], inputs: ExtraInputs) -> Chosen:
    """The router returns rows sorted by expert; the result is in the order of tokens."""
    order, _, sorted_weights, rows_of_expert, _ = seen[row.router]
    sorted_ids = torch.arange(len(rows_of_expert)).repeat_interleave(torch.tensor(rows_of_expert))
    top_k = block.router.top_k
    return torch.empty_like(sorted_ids).scatter(0, order, sorted_ids).view(-1, top_k), torch.empty_like(
        sorted_weights
    ).scatter(0, order, sorted_weights).view(-1, top_k)


def _two_banks(row: BlockRow, block: Any, seen: dict[str, Any], inputs: ExtraInputs) -> Chosen:
    """Ids are relative to the bank of the token's modality."""
    text, vision = (seen.get(name) for name in row.router.split())
    if vision is None:
        return text[2], text[1]
    is_vision = inputs["modality"].flatten().bool()
    expert_ids = torch.zeros(is_vision.numel(), text[2].shape[-1], dtype=torch.int64)
    weights = torch.zeros(expert_ids.shape)
    for (_, bank_weights, bank_ids), where in ((text, ~is_vision), (vision, is_vision)):
        expert_ids[where], weights[where] = bank_ids, bank_weights
    return expert_ids, weights


def _none(row: BlockRow, block: Any, seen: dict[str, Any], inputs: ExtraInputs) -> Chosen:
    return None, None


READERS: dict[str, Callable[[BlockRow, Any, dict[str, Any], ExtraInputs], Chosen]] = {
    "standard": _standard,
    "llama4": _llama4,
    "dbrx": _dbrx,
    "jetmoe": _jetmoe,
    "two_banks": _two_banks,
    "none": _none,
}
