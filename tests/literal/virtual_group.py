"""Virtual-group upcycling of one FFN, number by number, and a token-choice top-k MoE, one token at a time.

A reference for tests, written from arXiv:2410.07524 and Megatron-LM's `upcycling_utils.py`. Torch is used only so that
autograd gives the gradients.

Shape suffixes: V copies, E = V G experts, S = H / G hidden neurons of a shard.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Expert = tuple[Tensor, Tensor, Tensor, Tensor]  # w1_HD, b1_H, w2_DH, b2_D


def scales(granularity: int, scaling: Literal["exact", "megatron"]) -> tuple[float, float]:
    """Factors of W1 (and b1) and of W2 for topk-then-softmax: a = G, on W2 alone or a^(1/2) on either."""
    if scaling == "exact":
        return 1.0, float(granularity)
    return math.sqrt(granularity), math.sqrt(granularity)


def shard(dense: Expert, granularity: int, number: int, scaling: Literal["exact", "megatron"] = "exact") -> Expert:
    """Neurons number * S to (number + 1) * S of the dense FFN."""
    w1_HD, b1_H, w2_DH, b2_D = dense
    hidden, width = w1_HD.shape
    assert hidden % granularity == 0
    first, second = scales(granularity, scaling)
    size = hidden // granularity
    w1_SD, b1_S, w2_DS = torch.zeros(size, width), torch.zeros(size), torch.zeros(width, size)
    w1_SD, b1_S, w2_DS = w1_SD.to(w1_HD), b1_S.to(w1_HD), w2_DS.to(w1_HD)
    for s in range(size):
        h = number * size + s
        b1_S[s] = b1_H[h] * first
        for d in range(width):
            w1_SD[s, d] = w1_HD[h, d] * first
            w2_DS[d, s] = w2_DH[d, h] * second
    return w1_SD, b1_S, w2_DS, b2_D.clone()


def upcycle(
    dense: Expert, router_ED: Tensor, granularity: int, scaling: Literal["exact", "megatron"] = "exact"
) -> tuple[list[Expert], Tensor]:
    """[shard 0 .. G - 1] for every copy, and the router: its first V rows, each G times one after the other."""
    copies = len(router_ED) // granularity
    experts, rows = [], []
    for c in range(copies):
        for number in range(granularity):
            experts.append(shard(dense, granularity, number, scaling))
            rows.append(router_ED[c])
    return experts, torch.stack(rows)


def forward(
    x_TD: Tensor, router_ED: Tensor, experts: list[Expert], act: Callable[[Tensor], Tensor], k: int
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Output [T, D], l_aux for k > 2, and the chosen experts of each token, without capacity; ties: the lower index."""
    num_experts = len(experts)
    outputs, chosen_T, probs_T = [], [], []
    for x_D in x_TD:
        probs_E = torch.softmax(router_ED @ x_D, dim=0)  # over all experts, then top-k
        order = sorted(range(num_experts), key=lambda e: (-probs_E[e].item(), e))
        chosen = order[:k]
        total = sum((probs_E[e] for e in chosen), torch.zeros((), dtype=x_D.dtype))
        y_D = torch.zeros_like(x_D)
        for e in chosen:
            w1_HD, b1_H, w2_DH, b2_D = experts[e]
            y_D = y_D + probs_E[e] / total * (w2_DH @ act(w1_HD @ x_D + b1_H) + b2_D)
        outputs.append(y_D)
        chosen_T.append(chosen)
        probs_T.append(probs_E)
    l_aux = torch.zeros((), dtype=x_TD.dtype)
    for e in range(num_experts):
        f = sum(e in chosen for chosen in chosen_T) / (len(x_TD) * k)  # all choices count, divided by k
        p_mean = sum((probs_E[e] for probs_E in probs_T), torch.zeros_like(l_aux)) / len(x_TD)
        l_aux = l_aux + num_experts * f * p_mean
    return torch.stack(outputs), l_aux, chosen_T
