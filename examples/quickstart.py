"""The layer in ten lines: one compiled graph serves every number of tokens. Run: python examples/quickstart.py"""

import torch
from torch._dynamo.utils import counters

from moe_fn import MoEConfig, MoEWeights, mark_tokens, moe_forward, route
from moe_fn.balance import expert_load

config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=128)
weights = MoEWeights(gate_up=torch.randn(8, 256, 64) / 64**0.5, down=torch.randn(8, 64, 128) / 128**0.5)
layer = torch.compile(moe_forward, fullgraph=True)
for tokens in (5, 64, 1, 0):
    x, logits = torch.randn(tokens, 64), torch.randn(tokens, 8)  # logits: the output of your router
    mark_tokens(x, logits)  # their first dimension is the number of tokens
    y = layer(config, weights, x, logits)
    load = expert_load(route(config, weights, logits).expert_ids, config.num_experts)
    print(f"{tokens:2} tokens -> {tuple(y.shape)}, load of each expert {load.tolist()}")
print(f"{counters['stats']['unique_graphs']} graph, {sum(counters['graph_break'].values())} breaks")
assert counters["stats"]["unique_graphs"] == 1
