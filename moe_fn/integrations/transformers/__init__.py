"""moe_fn inside Hugging Face transformers (`pip install "moe_fn[transformers]"`).

`register`   model.set_experts_implementation("moe_fn"): the model's own routers and blocks, with our experts
"""

from moe_fn.integrations.transformers.experts import register

__all__ = ["register"]
