"""Small random models of four families, for examples that need one without a download."""

from typing import Any

import torch
import transformers

# Arguments of all configs; no end token, so that generation has a fixed length. With a standard deviation of 0.04 of
# the weights, activations neither vanish nor grow at these widths.
COMMON = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "initializer_range": 0.04,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Latent attention
MLA = {"q_lora_rank": 128, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
# name: the config's class, and its arguments
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "norm_topk_prob": True,
        "head_dim": 64},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "intermediate_size": 1024,
            "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 8,
            **MLA,
        },
    ),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 512,
    "head_dim": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1792}),
}  # fmt: skip
TINY = {"hidden_size": 64, "vocab_size": 128, "initializer_range": 0.12}


def small_model(name: str, dtype: torch.dtype, tiny: bool = False, seed: int = 0) -> Any:
    """Returns a causal language model of the family with random parameters, biases of experts and routers included."""
    config_class, arguments = MODELS[name]
    smaller = {**TINY, "num_hidden_layers": 1 + arguments.get("first_k_dense_replace", 0)} if tiny else {}
    config = getattr(transformers, config_class)(**{**COMMON, **arguments, **smaller})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in tensor_name.rpartition(".")[2]:
                tensor.normal_(std=0.02)
    return model.to(dtype).eval()
