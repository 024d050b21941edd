"""DeepSpeed's gate and MoE layer, with a ragged compute where one rank has all experts.

DeepSpeed pads every expert to its capacity: at capacity factor 2 it computes twice the rows that were routed. With
`ep_size` 1 we sort the routed rows by expert and compute just these (`expert_backends`); under expert parallelism we
use DeepSpeed's forward. Routing is DeepSpeed's own, to the bit; outputs and gradients agree to rounding.

In evaluation capacity is unlimited and nothing is sampled, so that an output never depends on the rest of the batch.

Shape suffixes: T tokens (of the local micro-batch, padding left out), D width, N experts, K choices per token,
R routed rows (K*T less those dropped).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench import protocol
from upcycle_bench.model.deepspeed_import import TopKGate
from upcycle_bench.model.deepspeed_import import capacity as deepspeed_capacity
from upcycle_bench.model.top2 import top2


class Gate(TopKGate):
    """DeepSpeed's top-k gate with capacity and sampling in training only, and a load-balancing loss that is global.

    DeepSpeed's l_aux is a product of local means, so two ranks would not sum to one rank with the same batch. Here
    f_e (no gradient) and the token count are summed over all ranks; with one rank it is DeepSpeed's value.
    """

    def __init__(self, width: int, moe: protocol.MoE) -> None:
        super().__init__(
            width,
            moe.experts,
            moe.top_k,
            capacity_factor=moe.capacity_factor,
            eval_capacity_factor=moe.capacity_factor,
            min_capacity=moe.min_capacity,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.second_expert_sampling = moe.second_expert_sampling
        self.own_factor, self.own_minimum = moe.capacity_factor, moe.min_capacity
        self.routed = self.dropped = 0

    def forward(
        self, x_TD: Tensor, used_token: None = None, sparse_routes: bool = True, use_tutel: bool = False
    ) -> tuple[Any, ...]:
        """Routes of T tokens: (l_aux, capacity, N, index_KT (-1: dropped), location_KT, gates_KT, counts_N)."""
        self.drop_tokens = self.training
        self.top2_2nd_expert_sampling = self.second_expert_sampling and self.training
        # No expert needs more slots than there are tokens, and top1gating refuses a larger minimum.
        self.capacity_factor, self.min_capacity = self.own_factor, min(self.own_minimum, len(x_TD))
        if self.training and self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            slots = self._group_capacity(len(x_TD))
            # Half a slot less, which `ceil` makes whole again however the factor is rounded.
            self.capacity_factor = (slots - 0.5) * self.wg.out_features / (len(x_TD) * self.k)
            self.min_capacity = 0
        with torch.autocast(x_TD.device.type, enabled=False):  # it would make DeepSpeed's float32 logits bfloat16
            routes = self._top2(x_TD) if self._is_plain_top2() else super().forward(x_TD, None, True, False)
            l_aux, capacity, experts, index_KT, location_KT, gates_KT, counts_N = routes
            world = dist.get_world_size() if self.training and dist.is_initialized() else 1
            if x_TD.dtype == torch.float64 or world > 1:
                dtype = torch.promote_types(x_TD.dtype, torch.float32)
                probs_TN = F.softmax(F.linear(x_TD.to(dtype), self.wg.weight.to(dtype)), dim=1)
                if world > 1:
                    l_aux = self._global_load_balance(probs_TN, world)
                if x_TD.dtype == torch.float64:  # DeepSpeed's gate values have float32 accuracy
                    gates_KT = _renormalised(probs_TN, index_KT)
        if self.training:
            self.routed += index_KT.numel()
            self.dropped = self.dropped + (index_KT < 0).sum()
        return l_aux, capacity, experts, index_KT, location_KT, gates_KT, counts_N

    def _is_plain_top2(self) -> bool:
        alone = self.ep_group is None or dist.get_world_size(self.ep_group) == 1
        return self.k == 2 and alone and not self.top2_2nd_expert_sampling

    def _top2(self, x_TD: Tensor) -> tuple[Any, ...]:
        logits_TN = F.linear(x_TD.float(), self.wg.weight.float())
        return top2(logits_TN, self._capacity(len(x_TD)) if self.drop_tokens else None)

    def _set_ep_group(self, ep_group: Any) -> None:
        """As the parent, and again when the next stage of a training makes its engine."""
        self.ep_group = ep_group

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which cannot be copied; the copy's own engine gives it one."""
        return self.__dict__ | {"ep_group": None}

    def _group_capacity(self, num_tokens: int) -> int:
        """The largest capacity of the expert-parallel group: captions differ in length, the all-to-all must not."""
        capacity = self._capacity(num_tokens).to(self.wg.weight.device)
        dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        return int(capacity)

    def _capacity(self, num_tokens: int) -> Tensor:
        shape = torch.empty(num_tokens, self.wg.out_features, device="meta")
        return deepspeed_capacity(shape, torch.tensor(self.capacity_factor * self.k), torch.tensor(self.min_capacity))

    def _global_load_balance(self, probs_TN: Tensor, world: int) -> Tensor:
        """N sum_e f_e Pbar_e (Eq. 5) with f and the token count over all ranks; its mean over ranks is the global one.

        f counts first choices for k <= 2 and all choices (divided by k) beyond, as DeepSpeed does.
        """
        experts = probs_TN.shape[1]
        chosen_TK = probs_TN.detach().topk(self.k if self.k > 2 else 1, dim=1).indices
        chosen_TK = chosen_TK if self.k > 2 else probs_TN.detach().argmax(1, keepdim=True)
        totals = torch.cat(
            [torch.bincount(chosen_TK.flatten(), minlength=experts), chosen_TK.new_tensor([len(probs_TN)])]
        )
        dist.all_reduce(totals)
        f_N = totals[:-1] / (totals[-1] * chosen_TK.shape[1])
        return experts * (f_N * probs_TN.sum(0)).sum() / totals[-1] * world

    def take_dropped(self) -> tuple[int, int]:
        """(choices dropped, choices routed) in training since the last call."""
        counts = int(self.dropped), self.routed
        self.routed = self.dropped = 0
        return counts


def _renormalised(probs_TN: Tensor, index_KT: Tensor) -> Tensor:
    """Gate values over the surviving choices, [K, T]; a single choice (k = 1) keeps its raw probability."""
    kept_KT = index_KT >= 0
    gates_KT = probs_TN.t().gather(0, index_KT.long().clamp(min=0)) * kept_KT
    if len(index_KT) == 1:
        return gates_KT
    return gates_KT / gates_KT.sum(0).clamp(min=torch.finfo(torch.float32).eps)
