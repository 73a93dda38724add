"""Low-rank adapters on the experts, as a value."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_fn.checks import check_choice, check_int

LoRAExperts = Literal["each", "shared", "outer_shared"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters that tokens choose among: expert e of a token with adapter l computes with W[e] + B[l, e] A[l, e] in the
    place of W[e].

    num_adapters  how many there are; a token's id is 0 .. num_adapters - 1, any other id is no adapter
    rank          the largest rank among them; smaller ones are padded with zeros
    experts       "each" expert has matrices of its own; "shared": all experts of a layer have the same; "outer_shared":
                  they share what faces the model's width (gate_up's A and down's B), and have what faces the
                  intermediates for their own

    The factor alpha / rank is in B (`moe_fn.make_lora` puts it there). Shared and zero experts have no adapters.

    Laws
        LoRA equals the reference.
        An adapter of zeros changes nothing.
        Tokens without an adapter get the layer without LoRA.
        Gradients reach A and B.
        Relabelling adapters changes nothing.

    Source: Hu et al. 2021 (arXiv 2106.09685); rows sorted by adapter: Punica (2310.18547), S-LoRA (2311.03285).
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
