"""DeepSpeed's MoE layer in plain PyTorch, for where DeepSpeed is not installed: enough to load, serve and score.

    layer = MoE(width, nn.Identity(), experts, 1, top_k)        # the same modules and parameters, by the same names

So a file of weights fits either layer, and routes are DeepSpeed's to the bit (tests/model/test_plain_moe.py). Left out
is what only training needs: process groups, DeepSpeed's own computation of the experts, and its engine.

Source: deepspeed 0.19.8, `moe.layer`, `moe.experts` and `moe.sharded_moe`, Apache-2.0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.util.errors import UserError

Choices = tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]  # the fields of `routes.Routes`, in their order


class MoE(nn.Module):
    """`deepspeed.moe.layer.MoE`: the layer that is in `deepspeed_moe`."""

    def __init__(self, hidden_size: int, expert: nn.Module, num_experts: int, ep_size: int, k: int) -> None:
        super().__init__()
        self.ep_size, self.num_experts, self.num_local_experts = ep_size, num_experts, num_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        gate, experts = TopKGate(hidden_size, num_experts, k), Experts(expert, self.num_local_experts)
        self.deepspeed_moe = MOELayer(gate, experts, self.expert_group_name, ep_size, self.num_local_experts)

    def forward(self, x_TD: Tensor, used_token: None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> y [T, D], the load-balancing loss, and the choices of each expert [E]."""
        y_TD = self.deepspeed_moe(x_TD, used_token)
        return y_TD, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


class Experts(nn.Module):
    """`deepspeed.moe.experts.Experts`: a list; `MoEFFN` puts in its own."""

    def __init__(self, expert: nn.Module, num_local_experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList([expert] * num_local_experts)


class MOELayer(nn.Module):
    """`deepspeed.moe.sharded_moe.MOELayer`: a gate and experts. `dispatch.RaggedMOELayer` computes."""

    l_aux: Any
    exp_counts: Any

    def __init__(
        self, gate: nn.Module, experts: nn.Module, ep_group_name: str, ep_size: int, num_local_experts: int
    ) -> None:
        super().__init__()
        self.gate: Any = gate
        self.experts: Any = experts
        self.ep_group: Any = None
        self.ep_size, self.ep_group_name, self.num_local_experts = ep_size, ep_group_name, num_local_experts

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """UserError: this computation is DeepSpeed's own."""
        raise UserError(
            "expert parallelism and the backend `deepspeed` of the experts need DeepSpeed, which is not installed: "
            "pip install 'deepspeed>=0.19.8,<0.20'."
        )


class TopKGate(nn.Module):
    """`deepspeed.moe.sharded_moe.TopKGate` without noise on its input, and for one choice without drops.

    `model.gate.Gate` drops the single choice itself. Several choices are dropped as DeepSpeed does it: of two by
    position, of more by probability.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        use_rts: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.ep_group: Any = None
        self.k, self.min_capacity, self.drop_tokens = k, min_capacity, True
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling

    def forward(self, x_TD: Tensor, *_: Any) -> Choices:
        """The fields of `routes.Routes`, in float32 as DeepSpeed's."""
        logits_TE = F.linear(x_TD.float(), self.wg.weight.float())
        if self.k == 1:
            return _one_choice(logits_TE)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        slots = capacity(logits_TE, torch.tensor(factor * self.k), torch.tensor(self.min_capacity))
        limit = slots if self.drop_tokens else None
        if self.k == 2:
            return _two_choices(logits_TE, limit, self.top2_2nd_expert_sampling)
        return _more_choices(logits_TE, self.k, limit)


def capacity(gates_TE: Tensor, factor: Tensor, minimum: Tensor) -> Tensor:
    """ceil(T / E * factor), at least `minimum`: DeepSpeed's `_capacity`."""
    tokens, experts = gates_TE.shape
    return torch.maximum(torch.ceil((tokens / experts) * factor).to(torch.int64), minimum.to(torch.int64))


def _one_choice(logits_TE: Tensor) -> Choices:
    """`top1gating` without drops: the gate is the raw probability of the best expert."""
    probs_TE, experts = F.softmax(logits_TE, dim=1), logits_TE.shape[1]
    first_T = probs_TE.argmax(1)
    mask_TE = F.one_hot(first_T, experts)
    counts_E = mask_TE.sum(0)
    l_aux = (probs_TE.mean(0) * mask_TE.float().mean(0)).sum() * experts
    place_T = ((mask_TE.cumsum(0) - 1) * mask_TE).sum(1)
    gates_T = (probs_TE * mask_TE).sum(1)
    return l_aux, counts_E.max(), experts, first_T.int()[None], place_T.int()[None], gates_T[None], counts_E


def _two_choices(logits_TE: Tensor, limit: Tensor | None, sampled: bool) -> Choices:
    """`top2gating`: first choices queue before second ones; those beyond `limit` are dropped by position."""
    probs_TE, experts = F.softmax(logits_TE, dim=1), logits_TE.shape[1]
    first_T = probs_TE.argmax(1)
    masks = [F.one_hot(first_T, experts)]
    if sampled:
        zero, one = logits_TE.new_zeros(()), logits_TE.new_ones(())
        logits_TE = logits_TE + torch.distributions.Gumbel(zero, one).rsample(logits_TE.shape)
    second_T = logits_TE.masked_fill(masks[0].bool(), float("-inf")).argmax(1)
    masks.append(F.one_hot(second_T, experts))
    places = [masks[0].cumsum(0) - 1, masks[1].cumsum(0) - 1 + masks[0].sum(0, keepdim=True)]
    l_aux = (probs_TE.mean(0) * masks[0].float().mean(0)).mean() * experts * experts
    counts_E = (masks[0] + masks[1]).sum(0)
    if limit is not None:
        masks = [mask_TE * torch.lt(place_TE, limit) for mask_TE, place_TE in zip(masks, places, strict=True)]
    gates_KT = torch.stack([(probs_TE * mask_TE).sum(1) for mask_TE in masks])
    gates_KT = gates_KT / gates_KT.sum(0).clamp(min=torch.finfo(gates_KT.dtype).eps)
    kept_KT = torch.stack([mask_TE.any(1) for mask_TE in masks])
    index_KT = torch.where(kept_KT, torch.stack([first_T, second_T]), -1).int()
    place_KT = torch.stack([(place_TE * mask_TE).sum(1) for place_TE, mask_TE in zip(places, masks, strict=True)]).int()
    return l_aux, counts_E.max() if limit is None else limit, experts, index_KT, place_KT, gates_KT, counts_E


def _more_choices(logits_TE: Tensor, k: int, limit: Tensor | None) -> Choices:
    """`topkgating`: beyond `limit` the choices of the least probability are dropped."""
    probs_TE, experts = F.softmax(logits_TE, dim=1), logits_TE.shape[1]
    top_TK, index_TK = torch.topk(probs_TE, k=k, dim=1)
    mask_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, index_TK, True)
    counts_E = mask_TE.sum(0)
    l_aux = (probs_TE.mean(0) * mask_TE.float().mean(0)).mean() * experts * experts / k
    if limit is not None:
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, index_TK, top_TK)
        best = torch.topk(chosen_TE, k=min(int(limit), len(chosen_TE)), dim=0, sorted=False).indices
        mask_TE = mask_TE & torch.zeros_like(mask_TE).scatter_(0, best, True)
    gates_TE = probs_TE * mask_TE
    gates_TE = gates_TE / gates_TE.sum(1, keepdim=True).clamp(min=torch.finfo(gates_TE.dtype).eps)
    kept_TK = mask_TE.gather(1, index_TK)
    place_TK = (mask_TE.cumsum(0) - 1).gather(1, index_TK) * kept_TK
    chosen = torch.where(kept_TK, index_TK, -1), place_TK, gates_TE.gather(1, index_TK)
    index_KT, place_KT, gates_KT = (part.t().contiguous() for part in chosen)
    slots = counts_E.max() if limit is None else limit
    return l_aux, slots, experts, index_KT.int(), place_KT.int(), gates_KT, counts_E
