"""Compiled calls of the layer, and the counters of torch's compile caches.

python -m compile_tests.cached_calls NAME...
"""

import contextlib
import json
import sys
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters

import moe_fn
from moe_fn import LoRAConfig, MoEConfig, QuantConfig
from moe_fn.testing import weights_for

TOKENS, SIZES = 20, {"num_experts": 4, "top_k": 2, "hidden_size": 32, "intermediate_size": 32}
# Options of the config by words in a call's name; other words: "given" logits, "masked", "marked" tokens, under
# "autocast", "backward".
WORDS: dict[str, dict[str, Any]] = {
    "chunked": {"chunk_tokens": 16},
    "opaque": {"opaque": True},
    "stages": {"backend": "torch"},
    "quantized": {"quant": QuantConfig(scheme="int8", granularity="channel")},
    "lora": {"lora": LoRAConfig(rank=4, num_adapters=2)},
    "invariant": {"batch_invariant": True},
}
NAMES = (
    "plain",
    "given backward",
    "marked masked given",
    "chunked",
    "chunked backward",
    "quantized backward",
    "lora backward",
    "autocast",
    "autocast marked given",
    "autocast backward",
    "autocast stages backward",
    "autocast chunked marked masked given backward",
    "autocast opaque",
    "autocast quantized",
    "autocast lora",
    "autocast invariant",
)


def call(name: str) -> None:
    """Runs one compiled call, and its backward if the name has "backward"."""
    words = name.split()
    options: dict[str, Any] = {}
    for word in words:
        options |= WORDS.get(word, {})
    config, generator = MoEConfig(**SIZES, **options), torch.Generator().manual_seed(0)
    weights = weights_for(config, seed=0, requires_grad="backward" in words)
    x = torch.randn(TOKENS, config.hidden_size, generator=generator, requires_grad="backward" in words)
    logits = torch.randn(TOKENS, config.num_logits, generator=generator) if "given" in words else None
    mask = torch.arange(TOKENS) > 3 if "masked" in words else None
    adapters = torch.arange(TOKENS) % 2 if config.lora else None
    if "marked" in words:
        moe_fn.mark_tokens(x, logits, mask, adapters)
    layer = torch.compile(moe_fn.moe_forward, fullgraph=True)
    around = torch.autocast("cpu", dtype=torch.bfloat16) if "autocast" in words else contextlib.nullcontext()
    with around:
        y = layer(config, weights, x, logits, token_mask=mask, adapter_ids=adapters)
    if "backward" in words:
        y.sum().backward()


def counted(name: str) -> dict[str, int]:
    """Returns hits, misses and bypasses of AOTAutograd's and Inductor's caches in one call."""
    torch._dynamo.reset()
    counters.clear()
    call(name)
    found = {key: count for key, count in counters["aot_autograd"].items() if key.startswith("autograd_cache")}
    return found | {key: count for key, count in counters["inductor"].items() if key.startswith("fxgraph_cache")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    print(json.dumps({name: counted(name) for name in sys.argv[1:]}))
