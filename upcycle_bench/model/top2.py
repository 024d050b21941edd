"""Top-2 routing as DeepSpeed's `top2gating` does it, without its dense masks.

    l_aux, capacity, experts, index_KT, location_KT, gates_KT, counts_E = top2(logits_TE, capacity)

Routes, places in the queues, gate values, load-balancing loss and gradients are DeepSpeed's to the bit (tested). On a
CPU it takes half the time. `gate.Gate` calls DeepSpeed itself in the other cases: one choice or more than two, sampling
of the second, expert parallelism.

Shape suffixes: K = 2; M = 2 T choices, all first ones before all second ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def top2(logits_TE: Tensor, capacity: Tensor | None) -> tuple[Any, ...]:
    """Routes of T tokens from float32 logits, in the order of `gate.Routes`.

    With `capacity` None nothing is dropped, and the capacity returned is the longest queue. An expert's queue takes
    first choices before second ones, each in the order of tokens. Where a choice is dropped, index_KT is -1 and
    location_KT is 0. l_aux is E sum_e f_e P_e with f_e the share of first choices (GShard, arXiv:2006.16668).
    """
    num_tokens, experts = logits_TE.shape
    probs_TE = F.softmax(logits_TE, dim=1)
    first_T = probs_TE.argmax(1)
    second_T = logits_TE.detach().scatter(1, first_T[:, None], float("-inf")).argmax(1)
    index_KT = torch.stack([first_T, second_T])

    # One row for each expert: the sums run over contiguous 32-bit numbers.
    chosen_EM = (torch.arange(experts, device=index_KT.device)[:, None] == index_KT.flatten()).int()
    place_EM = chosen_EM.cumsum(1, dtype=torch.int32)
    first_E, counts_E = chosen_EM[:, :num_tokens].sum(1), chosen_EM.sum(1)
    location_KT = place_EM.gather(0, index_KT.view(1, -1)).view_as(index_KT) - 1

    l_aux = torch.mean(probs_TE.mean(0) * (first_E.float() / num_tokens)) * experts * experts
    gates_KT = probs_TE.gather(1, index_KT.t()).t()
    if capacity is None:
        capacity = counts_E.max()
    # On a CPU a look at the counts is cheaper than the masks. On a GPU the look would wait for the device.
    elif logits_TE.is_cuda or bool((counts_E > capacity).any()):
        kept_KT = location_KT < capacity
        gates_KT = gates_KT * kept_KT
        index_KT, location_KT = index_KT.where(kept_KT, -1), location_KT.where(kept_KT, 0)
    gates_KT = gates_KT / gates_KT.sum(0).clamp(min=torch.finfo(gates_KT.dtype).eps)
    return l_aux, capacity, experts, index_KT.int(), location_KT, gates_KT, counts_E
