"""Config of LoRA: the number and rank of low-rank adapters on the experts."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_fn.checks import check_choice, check_int

LoRAExperts = Literal["each", "shared", "outer_shared"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """LoRA adapters, one per token: with adapter l, expert e computes with W[e] + B[l, e] A[l, e] instead of W[e].

    num_adapters  number of adapters; a token's adapter id is 0 .. num_adapters - 1, any other id means no adapter
    rank          the largest rank of the adapters; smaller ones are padded with zeros
    experts       "each": every expert has its own A and B; "shared": all experts share A and B; "outer_shared": all
                  experts share the matrices on the side of the hidden size (gate_up's A, down's B), and each has its
                  own on the side of the intermediate size

    B includes the factor alpha / rank (`moe_fn.make_lora` multiplies it in). Shared and zero experts have no adapters.

    Laws
        LoRA equals the reference.
        An adapter of zeros changes nothing.
        Tokens without an adapter get the layer without LoRA.
        Gradients reach A and B.
        Relabelling adapters changes nothing.

    Source: Hu et al. 2021 (arXiv 2106.09685); rows grouped by adapter: Punica (2310.18547), S-LoRA (2311.03285).
    """

    num_adapters: int = 1
    rank: int = 8
    experts: LoRAExperts = "each"

    def __post_init__(self) -> None:
        check_int("LoRAConfig.num_adapters", self.num_adapters, 1)
        check_int("LoRAConfig.rank", self.rank, 1)
        check_choice("LoRAConfig.experts", self.experts, get_args(LoRAExperts))

    def shares(self, name: str) -> bool:
        """Whether all experts have the same tensor `name` of LoRAWeights."""
        return self.experts == "shared" or (self.experts == "outer_shared" and name in ("gate_up_a", "down_b"))
