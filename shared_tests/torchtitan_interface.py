"""A copy of the published interface of torchtitan 0.3.0's Mixture-of-Experts modules, for tests without torchtitan.

It has the names, signatures, parameters and results of models/common/{moe,token_dispatcher,feed_forward}.py,
models/gpt_oss/moe.py and overrides/fused_swiglu.py, without sharding, initialization and configs of parts.
One thing is added: `compute_dtype`, bfloat16 as theirs, can be set to None for experts that compute in the dtype of
their rows.
"""

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Configurable:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            if "__slots__" not in cls.Config.__dict__:
                raise TypeError(f"{cls.__name__}.Config must use @dataclass(kw_only=True, slots=True)")
            cls.Config._owner = cls

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None

        def build(self) -> Any:
            return self._owner(config=replace(self))


class GroupedExperts(nn.Module, Configurable):
    compute_dtype: torch.dtype | None = torch.bfloat16

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int
        hidden_dim: int
        num_experts: int

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        E, F_, D = config.num_experts, config.hidden_dim, config.dim
        for name, shape in self.shapes(E, F_, D).items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 4))

    def shapes(self, E: int, F_: int, D: int) -> dict[str, tuple[int, ...]]:
        return {"w1_EFD": (E, F_, D), "w2_EDF": (E, D, F_), "w3_EFD": (E, F_, D)}

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        offs = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        h_RF = F.silu(self._grouped_mm(A=x_RD, B_t=self.w1_EFD, offs=offs)) * self._grouped_mm(
            A=x_RD, B_t=self.w3_EFD, offs=offs
        )
        return self._grouped_mm(A=h_RF, B_t=self.w2_EDF, offs=offs).type_as(x_RD)

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        """torch._grouped_mm, which has bfloat16 only in some places, as a loop; B_t not transposed yet."""
        A, B_t = A.to(self.compute_dtype or A.dtype), B_t.to(self.compute_dtype or A.dtype)
        ends = [0, *offs.tolist()]
        blocks = [A[a:b] @ B_t[e].T for e, (a, b) in enumerate(itertools.pairwise(ends))]
        return torch.cat([*blocks, A.new_zeros(A.shape[0] - ends[-1], B_t.shape[1])])


class FusedGroupedExperts(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._register_state_dict_hook(self._split_w13_on_save)
        self.register_load_state_dict_pre_hook(self._merge_w13_on_load)

    def shapes(self, E: int, F_: int, D: int) -> dict[str, tuple[int, ...]]:
        return {"w13": (E, F_, 2, D), "w2_EDF": (E, D, F_)}

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        offs = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        gate_up = self._grouped_mm(A=x_RD, B_t=self.w13.flatten(1, 2), offs=offs)
        gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
        return self._grouped_mm(A=F.silu(gate) * up, B_t=self.w2_EDF, offs=offs).type_as(x_RD)

    @staticmethod
    def _split_w13_on_save(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        w13 = state.pop(f"{prefix}w13")
        state[f"{prefix}w1_EFD"], state[f"{prefix}w3_EFD"] = w13[:, :, 0].contiguous(), w13[:, :, 1].contiguous()

    @staticmethod
    def _merge_w13_on_load(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        halves = [state.pop(f"{prefix}{name}") for name in ("w1_EFD", "w3_EFD")]
        state[f"{prefix}w13"] = torch.stack(halves, dim=2)


class GptOssGroupedExperts(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        swiglu_limit: float = 7.0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.swiglu_limit = config.swiglu_limit

    def shapes(self, E: int, F_: int, D: int) -> dict[str, tuple[int, ...]]:
        return {
            "mlp1_weight_EGD": (E, 2 * F_, D), "mlp1_bias_EG": (E, 2 * F_), "mlp2_weight_EDF": (E, D, F_),
            "mlp2_bias_ED": (E, D),
        }  # fmt: skip

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        offs = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        tail = x_RD.shape[0] - offs[-1:]
        spread = lambda b: torch.cat([b, b.new_zeros(1, b.shape[1])]).repeat_interleave(
            torch.cat([num_tokens_per_expert_E, tail]), dim=0
        )
        h_RG = self._grouped_mm(A=x_RD, B_t=self.mlp1_weight_EGD, offs=offs)
        h_RG = h_RG + spread(self.mlp1_bias_EG).to(h_RG.dtype)
        glu, linear = (
            h_RG[..., ::2].clamp(max=self.swiglu_limit),
            h_RG[..., 1::2].clamp(-self.swiglu_limit, self.swiglu_limit),
        )
        h_RD = self._grouped_mm(A=glu * torch.sigmoid(1.702 * glu) * (linear + 1), B_t=self.mlp2_weight_EDF, offs=offs)
        return h_RD + spread(self.mlp2_bias_ED).to(h_RD.dtype)


@dataclass(frozen=True, kw_only=True)
class LocalDispatchMetadata:
    token_indices_experts_sorted_N: Tensor
    topk_scores_experts_sorted_N: Tensor


class LocalTokenDispatcher(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        num_experts: int
        top_k: int

    def __init__(self, config: Any) -> None:
        self.num_experts, self.top_k = config.num_experts, config.top_k

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        del ep_mesh

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        order = torch.argsort(topk_expert_ids_TK.view(-1), stable=True)
        metadata = LocalDispatchMetadata(
            token_indices_experts_sorted_N=order // self.top_k,
            topk_scores_experts_sorted_N=topk_scores_TK.view(-1)[order],
        )
        return x_TD[order // self.top_k], num_local_tokens_per_expert_E, metadata

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        scores = metadata.topk_scores_experts_sorted_N.reshape(-1, 1)
        wide = torch.promote_types(torch.float32, routed_output_RD.dtype)
        rows = (routed_output_RD.to(wide) * scores).to(routed_output_RD.dtype)
        index = metadata.token_indices_experts_sorted_N.reshape(-1, 1).expand(-1, x_TD.shape[-1])
        return torch.zeros_like(x_TD).scatter_add(0, index, rows)


class AllToAllTokenDispatcher(LocalTokenDispatcher):
    """A stand-in for dispatchers that communicate with other ranks."""


class RoutedExperts(nn.Module):
    def __init__(self, inner_experts: nn.Module, token_dispatcher: Any) -> None:
        super().__init__()
        self.inner_experts, self.token_dispatcher = inner_experts, token_dispatcher

    def forward(
        self, x_BLD: Tensor, topk_scores_BLK: Tensor, topk_expert_ids_BLK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> Tensor:
        B, L, D = x_BLD.shape
        x_TD, K = x_BLD.view(B * L, D), topk_scores_BLK.size(-1)
        rows, counts, metadata = self.token_dispatcher.dispatch(
            x_TD, topk_scores_BLK.view(-1, K), topk_expert_ids_BLK.view(-1, K), num_local_tokens_per_expert_E
        )
        return self.token_dispatcher.combine(self.inner_experts(rows, counts), metadata, x_TD).view(B, -1, D)


class TokenChoiceTopKRouter(nn.Module):
    def __init__(self, dim: int, num_experts: int, *, bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.gate, self.num_experts = nn.Linear(dim, num_experts, bias=bias), num_experts
        defaults = {
            "num_expert_groups": None, "num_limited_groups": None, "top_k": 1, "score_func": "sigmoid",
            "route_norm": False,
            "route_scale": 1.0, "_debug_force_load_balance": False,
        }  # fmt: skip
        for name, value in (defaults | options).items():
            setattr(self, name, value)

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x_BLD)
        scores = torch.sigmoid(logits) if self.score_func == "sigmoid" else F.softmax(logits, dim=-1)
        choice = scores if expert_bias_E is None else scores + expert_bias_E
        if self.num_expert_groups is not None:
            grouped = choice.unflatten(-1, (self.num_expert_groups, -1))
            kept = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.num_limited_groups, dim=-1)[1]
            outside = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter_(-1, kept, False)
            choice = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)
        ids = torch.topk(choice, k=self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(-1, ids)
        if self.route_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, ids, scores


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(dim, hidden_dim, bias=False), nn.Linear(hidden_dim, dim, bias=False),
            nn.Linear(dim, hidden_dim, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SigmoidGatedFeedForward(FeedForward):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * super().forward(x)


class MoE(nn.Module):
    def __init__(
        self, router: nn.Module, routed_experts: nn.Module, shared_experts: nn.Module | None, bias: bool
    ) -> None:
        super().__init__()
        self.routed_experts, self.router, self.shared_experts = routed_experts, router, shared_experts
        if bias:
            self.register_buffer("expert_bias_E", torch.randn(router.num_experts) / 10)
        else:
            self.expert_bias_E = None
        self.register_buffer("tokens_per_expert_E", torch.zeros(router.num_experts), persistent=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        scores_BLK, ids_BLK, scores_BLE = self.router(x_BLD, self.expert_bias_E)
        counts = torch.zeros_like(scores_BLE, dtype=torch.bool).scatter_(-1, ids_BLK, True).sum(dim=(0, 1))
        if self.training:
            with torch.no_grad():
                self.tokens_per_expert_E.add_(counts)
        out_BLD = self.routed_experts(x_BLD, scores_BLK, ids_BLK, counts)
        return out_BLD if self.shared_experts is None else out_BLD + self.shared_experts(x_BLD)


KINDS = (GroupedExperts, FusedGroupedExperts, GptOssGroupedExperts)
SIZES = SimpleNamespace(experts=8, top_k=2, dim=16, hidden=24)


def build_moe(
    kind: Any = GroupedExperts,
    shared: Any = None,
    bias: bool = False,
    dispatcher: Any = LocalTokenDispatcher,
    **router: Any,
) -> MoE:
    """Returns a layer of SIZES with random weights, whose experts compute in the dtype of their rows."""
    torch.manual_seed(0)
    s = SIZES
    experts = kind(kind.Config(dim=s.dim, hidden_dim=s.hidden, num_experts=s.experts))
    experts.compute_dtype = None
    routed = RoutedExperts(experts, dispatcher(dispatcher.Config(num_experts=s.experts, top_k=s.top_k)))
    shared = None if shared is None else shared(s.dim, 2 * s.hidden)
    return MoE(TokenChoiceTopKRouter(s.dim, s.experts, top_k=s.top_k, **router), routed, shared, bias)


def real_moe(shared: bool = True, **router: Any) -> Any:
    """Returns torchtitan's own MoE of SIZES, built from its configs."""
    pytest.importorskip("torchtitan.models.common.moe")
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    s = SIZES
    normal = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), nn.init.normal_)

    def linear(inputs: int, outputs: int) -> Any:
        return Linear.Config(in_features=inputs, out_features=outputs)

    experts = GroupedExperts.Config(dim=s.dim, hidden_dim=s.hidden, num_experts=s.experts, param_init=normal)
    dispatcher = LocalTokenDispatcher.Config(num_experts=s.experts, top_k=s.top_k)
    dense = FeedForward.Config(w1=linear(s.dim, s.hidden), w2=linear(s.hidden, s.dim), w3=linear(s.dim, s.hidden))
    return MoE.Config(
        num_experts=s.experts,
        routed_experts=RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
        router=TokenChoiceTopKRouter.Config(
            num_experts=s.experts, gate=linear(s.dim, s.experts), top_k=s.top_k, **router
        ),
        shared_experts=dense if shared else None,
    )


def real_built(config: Any) -> Any:
    torch.manual_seed(0)
    moe = config.build()
    moe.init_states()
    moe.expert_bias_E.copy_(torch.randn(SIZES.experts) / 10)
    return moe
