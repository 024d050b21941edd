"""The router: DeepSpeed's top-k gate, which drops and samples in training only and balances load over all ranks.

    routes = Gate(width, moe)(x_TD)

Routes are DeepSpeed's own. In evaluation capacity is unlimited and nothing is sampled, so that the output for a token
never depends on the rest of the batch.

Sources: `deepspeed.moe.sharded_moe.TopKGate`; equations of arXiv:2604.13508.
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
from upcycle_bench.model.routes import Routes


class Gate(TopKGate):
    """DeepSpeed's top-k gate with four differences.

    It drops and samples in training only. A single choice (k = 1) over capacity is dropped by position, as with two;
    DeepSpeed's top1gating leaves it to `torch.topk` which of equals it keeps. Under expert parallelism its capacity is
    the largest of the group. Its l_aux is global: DeepSpeed's is a product of local means, so that two ranks would not
    sum to one rank with the same batch. Here f_e (no gradient) and the token count are summed over all ranks; with one
    rank it is DeepSpeed's value.
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
        # The parent's attributes of similar names are set anew in every forward pass.
        self.second_expert_sampling = moe.second_expert_sampling
        self.own_factor, self.own_minimum = moe.capacity_factor, moe.min_capacity
        self.routed = 0
        self.dropped: int | Tensor = 0  # a tensor while it counts, so that no step waits for a GPU

    def forward(
        self, x_TD: Tensor, used_token: None = None, sparse_routes: bool = True, use_tutel: bool = False
    ) -> Routes:
        """Routes of T tokens [T, D]; the arguments behind `x_TD` are DeepSpeed's, and have no effect."""
        self.drop_tokens = self.training and self.k > 1
        self.top2_2nd_expert_sampling = self.second_expert_sampling and self.training
        # No expert needs more slots than there are tokens, and top1gating refuses a larger minimum.
        self.capacity_factor, self.min_capacity = self.own_factor, min(self.own_minimum, len(x_TD))
        if self.training and self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            slots = self._group_capacity(len(x_TD))
            # Half a slot less: DeepSpeed's `ceil` then gives `slots`, however float32 rounds the factor.
            self.capacity_factor = (slots - 0.5) * self.wg.out_features / (len(x_TD) * self.k)
            self.min_capacity = 0
        with torch.autocast(x_TD.device.type, enabled=False):  # it would make DeepSpeed's float32 logits bfloat16
            routes = Routes(*super().forward(x_TD, None, True, False))
            if self.training and self.k == 1:
                routes = _dropped_by_position(routes, self._capacity(len(x_TD)))
            world = dist.get_world_size() if self.training and dist.is_initialized() else 1
            if x_TD.dtype == torch.float64 or world > 1:
                dtype = torch.promote_types(x_TD.dtype, torch.float32)
                probs_TE = F.softmax(F.linear(x_TD.to(dtype), self.wg.weight.to(dtype)), dim=1)  # Eq. 3
                if world > 1:
                    routes = routes._replace(l_aux=self._global_load_balance(probs_TE, world))
                if x_TD.dtype == torch.float64:  # DeepSpeed's gate values have float32 accuracy
                    routes = routes._replace(gates_KT=_renormalised(probs_TE, routes.index_KT))
        if self.training:
            self.routed += routes.index_KT.numel()
            self.dropped = self.dropped + (routes.index_KT < 0).sum()
        return routes

    def take_dropped(self) -> tuple[int, int]:
        """(choices dropped, choices routed) in training since the last call."""
        counts = int(self.dropped), self.routed
        self.routed = self.dropped = 0
        return counts

    def _capacity(self, num_tokens: int) -> Tensor:
        """DeepSpeed's capacity for that many tokens, a scalar on the CPU."""
        shape = torch.empty(num_tokens, self.wg.out_features, device="meta")
        return deepspeed_capacity(shape, torch.tensor(self.capacity_factor * self.k), torch.tensor(self.min_capacity))

    def _group_capacity(self, num_tokens: int) -> int:
        """The largest capacity of the expert-parallel group.

        Ranks have captions of different lengths, but the all-to-all needs one capacity.
        """
        capacity = self._capacity(num_tokens).to(self.wg.weight.device)
        dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        return int(capacity)

    def _global_load_balance(self, probs_TE: Tensor, world: int) -> Tensor:
        """E sum_e f_e Pbar_e (Eq. 5), with f and the token count summed over all ranks.

        The mean over ranks of what it returns is the loss of all ranks' tokens. As in DeepSpeed, f counts first choices
        for k <= 2, and all choices (divided by k) for a larger k.
        """
        experts = probs_TE.shape[1]
        p_TE = probs_TE.detach()
        chosen_TK = p_TE.topk(self.k, dim=1).indices if self.k > 2 else p_TE.argmax(1, keepdim=True)
        totals = torch.cat(
            [torch.bincount(chosen_TK.flatten(), minlength=experts), chosen_TK.new_tensor([len(probs_TE)])]
        )
        dist.all_reduce(totals)
        f_E = totals[:-1] / (totals[-1] * chosen_TK.shape[1])
        return experts * (f_E * probs_TE.sum(0)).sum() / totals[-1] * world

    def _set_ep_group(self, ep_group: Any) -> None:
        """As the parent, which refuses a second call: the next stage of a training makes a new engine."""
        self.ep_group = ep_group

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which cannot be copied; the copy's own engine gives it one."""
        return self.__dict__ | {"ep_group": None}


def _dropped_by_position(routes: Routes, capacity: Tensor) -> Routes:
    """The routes of single choices, of which each expert keeps the first `capacity`."""
    kept_KT = routes.location_KT < capacity.to(routes.location_KT.device)
    return routes._replace(
        capacity=capacity,
        index_KT=torch.where(kept_KT, routes.index_KT, -1),
        location_KT=routes.location_KT * kept_KT,
        gates_KT=routes.gates_KT * kept_KT,
    )


def _renormalised(probs_TE: Tensor, index_KT: Tensor) -> Tensor:
    """Gate values over the surviving choices, [K, T]; a single choice (k = 1) keeps its raw probability."""
    kept_KT = index_KT >= 0
    gates_KT = probs_TE.t().gather(0, index_KT.long().clamp(min=0)) * kept_KT
    if len(index_KT) == 1:
        return gates_KT
    return gates_KT / gates_KT.sum(0).clamp(min=torch.finfo(torch.float32).eps)
