"""Mutants that no test can kill because they are equivalent programs: reasons, and the mutants of each."""

import re

ROUTE, WEIGHTS, EXPERTS, SHARED = (
    "stages/route.py",
    "stages/_routing_weights.py",
    "stages/experts.py",
    "stages/shared.py",
)
# reason: (file, text in the new line) ...
SAME: dict[str, tuple[tuple[str, str], ...]] = {
    "Dimension 1 is the last of two: logits are [tokens, choices], which route checks, and tokens are flattened.": (
        (WEIGHTS, "z.narrow(+1, config"),
        (WEIGHTS, "z.shape[+1]"),
        (WEIGHTS, "z = z.narrow(+1, 0"),
        (WEIGHTS, "[chosen, shared], +1)"),
        (WEIGHTS, ".gather(+1, ids)"),
        (WEIGHTS, "shared.shape[+1]"),
        (WEIGHTS, "token_mask.unsqueeze(+1)"),
        (ROUTE, "ids.view(*leading, ids.shape[+1])"),
        (ROUTE, "(ids.shape[+1], -1)"),
        ("stages/_scores.py", "logits).narrow(+1, 0"),
        (WEIGHTS, "sum(+1, keepdim"),
        (WEIGHTS, "order, +1, keepdim"),
        (SHARED, "hidden.unflatten(+1,"),
        (EXPERTS, "wide.square().mean(+1,"),
        ("stages/zero_experts.py", "w.sum(+1, keepdim"),
    ),
    "torch promotes to the same dtype without the cast: the other operand is float32, as weights of a Routing are, or wider.": (  # noqa: E501
        ("stages/combine.py", "config.top_k)).to(None)"),
        ("stages/combine.py", "routing.weights.to(None)"),
        ("stages/dispatch.py", "(x.to(None) * weights)"),
        (SHARED, "routing.shared_weights.to(None)"),
        (SHARED, "(y.to(None) * torch.sigmoid("),
        ("stages/zero_experts.py", "(y.to(None) + "),
        ("stages/zero_experts.py", "* x.to(None)"),
        ("balance/losses.py", "correction_bias.to(None) + rate"),
    ),
    "torch adds two halves in float32 and rounds once by itself.": (
        (EXPERTS, "out = out.to(None) + spread_over_rows"),
        ("stages/join.py", "wide = None"),
        ("stages/join.py", "(routed.to(None) + shared.to(wide))"),
        ("stages/join.py", "(routed.to(wide) + shared.to(None))"),
    ),
    "The bias changes the choice, and here the choice is given.": ((ROUTE, "RouterWeights(correction_bias=None)"),),
    "After one dimension, 1 is the last.": ((EXPERTS, "(torch.float32).unsqueeze(+1)"),),
    "The factor multiplies a 0 that the line above has set.": (("stages/combine.py", "unsqueeze(-1), 1)"),),
    "num_experts becomes num_experts either way.": (("stages/dispatch.py", "(ids <= num_experts), ids, num_experts)"),),
    "The dtype is the one that torch chooses by itself, and holds the same numbers.": (
        ("stages/dispatch.py", "torch.arange(num_experts, device=ids.device, dtype=None)"),
        ("stages/dispatch.py", "torch.arange(num_experts, device=ids.device, )"),
        (ROUTE, "taken.to(None).cumsum"),
        (ROUTE, "cumsum(-2, dtype=None)"),
        (ROUTE, "cumsum(-2, )"),
        ("balance/window.py", "window.ring.sum(0, )"),
        ("quant/wire.py", "decode_e8m0(scale, None)"),
    ),
    "All columns are kept where there are no more than choices.": (
        (WEIGHTS, "if (shared is not None) or True else z"),
    ),
    "Padding tokens have no expert, whatever finite logits they have.": (
        (ROUTE, "token_mask.unsqueeze(-1), logits, 1)"),
    ),
    "The formula without the branch gives the same: its parameter is neutral.": (
        ("moe_fn/stages/_activation.py", "(c.alpha != 1.0) or True"),
        ("moe_fn/stages/_activation.py", "if (activation.up_offset) or True"),
    ),
    "The kernel converts ends to int32 itself, and a second group has no rows.": (
        (ROUTE, "ends = torch.full((1,), x.shape[0], dtype=None)"),
        (ROUTE, "ends = torch.full((1,), x.shape[0], )"),
        (ROUTE, "ends = torch.full((2,), x.shape[0]"),
    ),
    "The value that is looked up for an unused tile is not used.": (
        ("triton/metadata.py", "tl.where(used, expert, 1)"),
    ),
    "What is not gate_up is down.": (
        (EXPERTS, "by_adapter, weights.lora, None, hidden"),
        (EXPERTS, 'weights.lora, "XXdownXX", hidden'),
        (EXPERTS, 'weights.lora, "DOWN", hidden'),
    ),
    "The norm of order 1 is that sum.": ((ROUTE, "if (order == 1.0) and False else"),),
    "Where rows are sent no scale is over all rows, so the mask of present rows is not read.": (
        ("quant/wire.py", "present = torch.ones(rows.shape[0], 1, device"),
    ),
    "An alias that only annotations name.": (("quant/inputs.py", "Scales = None"),),
    "Every object has a __module__.": (("integrations/transformers/reading.py", 'getattr(hook, "__module__", )'),),
    "A name has that part once.": (("checkpoint/quantized/modelopt.py", "module.replace(old, new, )"),),
    "Only zeros are divided: a norm that is not above 0 is a norm of zeros.": (
        (ROUTE, "torch.where(total > 0, total, 2)"),
    ),
}


# Survivors that are different programs, as far as is known, and why no test fails.
OPEN = """
experts.py:75 guards against codes without scales, which no test makes. 77 and 79 cast to the dtype that scales and codes have in all tests:
whether the casts are needed is not known. 78 makes a tensor on another device on a GPU: the test of devices has no codes, as torch without
CUDA cannot read an element of a fake tensor.
"""  # noqa: E501


def reason_of(file: str, change: str) -> str | None:
    """Returns the reason why a mutant is an equivalent program, or None."""
    new = re.split(r" -> ", change)[-1]
    for reason, places in SAME.items():
        if any(file.endswith(name) and text in new for name, text in places):
            return reason
    return None
