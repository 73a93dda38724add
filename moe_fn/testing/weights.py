"""Random weights for a config."""

import functools
import math

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.config.router import SCORINGS
from moe_fn.records import LatentWeights, LoRAWeights, MoEWeights, RouterWeights, SharedWeights
from moe_fn.testing.quant_weights import codes_for
from moe_fn.weights.spec import plain_sizes

# Correction biases are -1, 0 or 1 times this. With the grid of logits in `values.py`, sums of scores and biases, of one
# expert and of two, are equal or more than 1e-5 apart, so float32 and float64 choose the same experts (test_testing.py
# checks the table).
BIAS_STEP = 605 / 1024
# Softmax scores depend on the whole row, and no such step fits all rows; with this one, scores (whose sum is at most 1)
# only decide between experts with equal biases.
SOFTMAX_BIAS_STEP = 1.5


def weights_for(
    config: MoEConfig,
    seed: int | torch.Generator = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    bias: bool = True,
    scales: bool = True,
    vocabulary: int = 16,
) -> MoEWeights:
    """Random weights for a config: the required tensors, a router gate, and by flag the optional ones.

    seed           a number, or a CPU generator (which advances); values do not depend on the device
    dtype          of the layer; the router's gate, bias, correction_bias and expert_scale are float32 for narrower
                   dtypes
    requires_grad  of every floating tensor except router.correction_bias, which has no gradient
    bias           optional biases: of the experts, the shared experts, the latent projections, and the gate
    scales         other optional tensors: router.expert_scale, latent.input_norm, latent.output_norm
    vocabulary     rows of router.expert_ids_of_token, for hash routing; ids of a token are distinct

    With config.quant gate_up and down are random codes over all code values, with scales that keep values near 1.
    Matrices are normal with standard deviation 1/sqrt(fan in), so values stay near 1 at any width; scales are in 0.5 ..
    1.5.

    >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=3, intermediate_size=5)
    >>> weights = weights_for(config, seed=1, bias=False)
    >>> weights.gate_up.shape, weights.down.shape, weights.gate_up_bias
    (torch.Size([4, 10, 3]), torch.Size([4, 3, 5]), None)
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    make = _Maker(generator, dtype, torch.device(device), requires_grad)
    sizes = functools.partial(plain_sizes, config)
    width, inner = config.expert_hidden_size, config.intermediate_size
    constant = config.zero_experts is not None and config.zero_experts.kind == "constant"
    plain = {
        "gate_up": make.normal(*sizes(("gate_up",)), fan_in=width),
        "down": make.normal(*sizes(("down",)), fan_in=inner),
    }
    codes, quant = codes_for(config, plain, generator) if config.quant else (plain, None)
    return MoEWeights(
        gate_up=codes["gate_up"],
        down=codes["down"],
        gate_up_bias=make.normal(*sizes(("gate_up_bias",)), fan_in=4) if bias else None,
        down_bias=make.normal(*sizes(("down_bias",)), fan_in=4) if bias else None,
        expert_norm=make.scale(*sizes(("expert_norm",))) if config.expert_norm else None,
        constants=make.normal(*sizes(("constants",))) if constant else None,
        input_norm=make.scale(*sizes(("input_norm",))) if config.norms and config.norms.input else None,
        output_norm=make.scale(*sizes(("output_norm",))) if config.norms and config.norms.output else None,
        router=_router(config, make, bias, scales, vocabulary),
        shared=_shared(config, make, bias),
        latent=_latent(config, make, bias, scales),
        lora=_lora(config, make),
        quant=quant,
    )


def _router(config: MoEConfig, make: "_Maker", bias: bool, scales: bool, vocabulary: int) -> RouterWeights:
    make = make.at_least_float32()
    router, gate = config.router, plain_sizes(config, ("router", "gate"))
    step = SOFTMAX_BIAS_STEP if not SCORINGS[router.scoring] and router.correction_bias == "scores" else BIAS_STEP
    return RouterWeights(
        gate=make.normal(*gate, fan_in=gate[-1]),
        bias=make.normal(gate[0], fan_in=4) if bias else None,
        correction_bias=make.levels(config.num_choices, step=step) if router.correction_bias != "none" else None,
        expert_scale=make.scale(gate[0]) if scales else None,
        expert_ids_of_token=make.choices(vocabulary, config.top_k, of=config.num_choices)
        if router.selection == "hash"
        else None,
    )


def _shared(config: MoEConfig, make: "_Maker", bias: bool) -> SharedWeights | None:
    if config.shared is None:
        return None
    gate_up, hidden = plain_sizes(config, ("shared", "gate_up"))
    _, width = plain_sizes(config, ("shared", "down"))
    return SharedWeights(
        gate_up=make.normal(gate_up, hidden, fan_in=hidden),
        down=make.normal(hidden, width, fan_in=width),
        gate_up_bias=make.normal(gate_up, fan_in=4) if bias else None,
        down_bias=make.normal(hidden, fan_in=4) if bias else None,
        gate=make.normal(1, hidden, fan_in=hidden) if config.shared.gate == "sigmoid" else None,
    )


def _latent(config: MoEConfig, make: "_Maker", bias: bool, scales: bool) -> LatentWeights | None:
    if config.latent is None:
        return None
    hidden, size = config.hidden_size, config.latent.size
    return LatentWeights(
        input=make.normal(size, hidden, fan_in=hidden),
        output=make.normal(hidden, size, fan_in=size),
        input_bias=make.normal(size, fan_in=4) if bias else None,
        output_bias=make.normal(hidden, fan_in=4) if bias else None,
        input_norm=make.scale(size) if scales else None,
        output_norm=make.scale(size) if scales else None,
    )


def _lora(config: MoEConfig, make: "_Maker") -> LoRAWeights | None:
    if config.lora is None:
        return None
    sizes = {name: plain_sizes(config, ("lora", name)) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
    return LoRAWeights(**{name: make.normal(*size, fan_in=size[-1]) for name, size in sizes.items()})


class _Maker:
    """Makes random tensors on the CPU, so that a seed gives the same values for every device, and moves them."""

    def __init__(
        self, generator: torch.Generator, dtype: torch.dtype, device: torch.device, requires_grad: bool
    ) -> None:
        self.generator, self.dtype, self.device, self.requires_grad = generator, dtype, device, requires_grad

    def at_least_float32(self) -> "_Maker":
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        return _Maker(self.generator, dtype, self.device, self.requires_grad)

    def normal(self, *shape: int, fan_in: int = 1) -> Tensor:
        return self._place(torch.randn(shape, generator=self.generator) / math.sqrt(fan_in))

    def scale(self, *shape: int) -> Tensor:
        return self._place(torch.rand(shape, generator=self.generator) + 0.5)

    def levels(self, *shape: int, step: float) -> Tensor:
        values = torch.randint(-1, 2, shape, generator=self.generator) * step
        return values.to(self.device, self.dtype)

    def choices(self, rows: int, count: int, *, of: int) -> Tensor:
        return torch.rand(rows, of, generator=self.generator).argsort(-1)[:, :count].contiguous().to(self.device)

    def _place(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype).requires_grad_(self.requires_grad)
