"""Top-2 routing as DeepSpeed's `top2gating` does it, without its dense masks.

    l_aux, capacity, N, index_KT, location_KT, gates_KT, counts_N = top2(logits_TN, capacity)

The same routes, places in the queues, gate values, load-balancing loss and gradients, to the bit (tested); on a CPU in
half the time. DeepSpeed's own does the rest: one or more than two choices, sampling of the second, expert parallelism.

Shape suffixes: T tokens, N experts, K = 2 choices per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def top2(logits_TN: Tensor, capacity: Tensor | None) -> tuple[Any, ...]:
    """Routes of T tokens from float32 logits; `capacity` None: nothing is dropped (it is then the longest queue).

    index_KT is -1 and location_KT 0 where a choice was dropped: a queue takes first choices before second ones, each in
    the order of tokens. l_aux is N sum_e f_e P_e with f_e the share of first choices (GShard, arXiv:2006.16668).
    """
    num_tokens, experts = logits_TN.shape
    probs_TN = F.softmax(logits_TN, dim=1)
    first_T = probs_TN.argmax(1)
    second_T = logits_TN.detach().scatter(1, first_T[:, None], float("-inf")).argmax(1)
    index_KT = torch.stack([first_T, second_T])

    # One row an expert: contiguous sums, in 32 bits, over first choices and then second ones.
    chosen_NC = (torch.arange(experts, device=index_KT.device)[:, None] == index_KT.flatten()).int()
    place_NC = chosen_NC.cumsum(1, dtype=torch.int32)
    first_N, counts_N = chosen_NC[:, :num_tokens].sum(1), chosen_NC.sum(1)
    location_KT = place_NC.gather(0, index_KT.view(1, -1)).view_as(index_KT) - 1

    l_aux = torch.mean(probs_TN.mean(0) * (first_N.float() / num_tokens)) * experts * experts
    gates_KT = probs_TN.gather(1, index_KT.t()).t()
    if capacity is None:
        capacity = counts_N.max()
    # Looking is cheaper than masks on a CPU; on a GPU it would have to wait for what it sees.
    elif logits_TN.is_cuda or bool((counts_N > capacity).any()):
        kept_KT = location_KT < capacity
        gates_KT = gates_KT * kept_KT
        index_KT, location_KT = index_KT.where(kept_KT, -1), location_KT.where(kept_KT, 0)
    gates_KT = gates_KT / gates_KT.sum(0).clamp(min=torch.finfo(gates_KT.dtype).eps)
    return l_aux, capacity, experts, index_KT.int(), location_KT, gates_KT, counts_N
