"""The token-choice top-2 MoE layer and the EESD loss, one token at a time.

A reference for tests, written from DeepSpeed's steps (0.19.8, `moe/sharded_moe.py`, `top2gating` without second
expert sampling) and from Eqs. 3-5 and 11-12 of arXiv 2604.13508. Torch is used only so that autograd gives the
gradients; an expert that no token reached has the gradient None, not zeros.

Shape suffixes: K = 2.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Expert = tuple[Tensor, Tensor, Tensor, Tensor]  # w1_HD, b1_H, w2_DH, b2_D
Act = Callable[[Tensor], Tensor]


class LiteralMoE(NamedTuple):
    """What `moe_forward` returns; routing dtype is float32, or float64 for float64 inputs."""

    y_TD: Tensor  # output, dtype of x
    l_aux: Tensor  # scalar, routing dtype
    first_T: Tensor  # first expert of each token, int64, before dropping
    second_T: Tensor  # second expert of each token, int64, before dropping
    kept_TK: Tensor  # bool, False where capacity dropped the choice
    gates_TK: Tensor  # weights renormalised over the surviving choices, 0 where dropped, routing dtype
    expert_counts_E: Tensor  # int64, tokens that chose the expert first or second, before dropping


def capacity(num_tokens: int, num_experts: int, capacity_factor: float, k: int, min_capacity: int) -> int:
    """Slots of one expert: max(ceil(T / E * cf * k), min_capacity).

    DeepSpeed multiplies in float32: 10 / 3 * 1.05 * 2 gives 7 slots, where float64 would give 8.
    """
    slots = np.float32(num_tokens / num_experts) * np.float32(capacity_factor * k)
    return max(int(np.ceil(slots)), min_capacity)


def ffn(x_D: Tensor, expert: Expert, act: Act) -> Tensor:
    """One expert on one token, [D] -> [D]."""
    w1_HD, b1_H, w2_DH, b2_D = expert
    return w2_DH @ act(w1_HD @ x_D + b1_H) + b2_D  # Eq. 2 (with biases)


def probabilities(x_D: Tensor, router_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Router logits [E] and their softmax over all experts [E], in the routing dtype."""
    dtype = torch.float64 if x_D.dtype == torch.float64 else torch.float32
    logits_E = router_ED.to(dtype) @ x_D.to(dtype)
    return logits_E, torch.softmax(logits_E, dim=0)  # Eq. 3


def moe_forward(
    x_TD: Tensor,
    router_ED: Tensor,
    experts: list[Expert],
    act: Act,
    *,
    capacity: int | None,
) -> LiteralMoE:
    """The whole layer on T pooled tokens; `capacity` None is unlimited. Ties go to the lower expert index."""
    num_tokens, num_experts = x_TD.shape[0], router_ED.shape[0]

    # Steps 1-3: two choices of each token.
    probs: list[Tensor] = []
    first: list[int] = []
    second: list[int] = []
    for t in range(num_tokens):
        logits_E, probs_E = probabilities(x_TD[t], router_ED)
        i1 = int(torch.argmax(probs_E))
        others_E = logits_E.detach().clone()
        others_E[i1] = float("-inf")
        probs.append(probs_E)
        first.append(i1)
        second.append(int(torch.argmax(others_E)))

    # Steps 4-5: places are given in token order, all first choices before any second choice.
    queue = [0] * num_experts
    kept = [[False, False] for _ in range(num_tokens)]
    for slot, choices in enumerate((first, second)):
        for t in range(num_tokens):
            kept[t][slot] = capacity is None or queue[choices[t]] < capacity
            queue[choices[t]] += 1  # a dropped token counts too

    # Steps 6-7: renormalise over the surviving choices and add up the experts' outputs.
    y, gates = [], []
    for t in range(num_tokens):
        p1 = probs[t][first[t]] * kept[t][0]
        p2 = probs[t][second[t]] * kept[t][1]
        denominator = (p1 + p2).clamp(min=torch.finfo(p1.dtype).eps)
        g1, g2 = p1 / denominator, p2 / denominator
        y_D = torch.zeros_like(x_TD[t], dtype=p1.dtype)
        if kept[t][0]:
            y_D = y_D + g1 * ffn(x_TD[t], experts[first[t]], act)  # Eq. 4
        if kept[t][1]:
            y_D = y_D + g2 * ffn(x_TD[t], experts[second[t]], act)  # Eq. 4
        y.append(y_D.to(x_TD.dtype))
        gates.append(torch.stack([g1, g2]))

    # Step 8: only first choices count, before dropping; the share f has no gradient.
    l_aux = torch.zeros((), dtype=probs[0].dtype)
    for e in range(num_experts):
        f = sum(1 for i in first if i == e) / num_tokens
        p_mean = sum((probs[t][e] for t in range(num_tokens)), torch.zeros_like(l_aux)) / num_tokens
        l_aux = l_aux + num_experts * f * p_mean  # Eq. 5

    return LiteralMoE(
        y_TD=torch.stack(y),
        l_aux=l_aux,
        first_T=torch.tensor(first),
        second_T=torch.tensor(second),
        kept_TK=torch.tensor(kept),
        gates_TK=torch.stack(gates),
        expert_counts_E=torch.tensor(queue),
    )


def eesd_loss(
    x_TD: Tensor,
    y_TD: Tensor,
    teacher_router_ED: Tensor,
    teacher_experts: list[Expert],
    act: Act,
    *,
    feature_reduction: Literal["sum", "mean"],
) -> Tensor:
    """Distance of the student's output to the teacher's full-softmax ensemble, over the T (non-padding) tokens given.

    Only `y_TD` gets a gradient. The ensemble and the loss are float32, or float64 for float64 inputs.
    """
    if feature_reduction not in ("sum", "mean"):
        raise ValueError(f"feature_reduction must be 'sum' or 'mean', not {feature_reduction!r}")
    num_tokens, width = x_TD.shape
    losses = []
    for t in range(num_tokens):
        with torch.no_grad():
            _, probs_E = probabilities(x_TD[t], teacher_router_ED)
            ensemble_D = torch.zeros(width, dtype=probs_E.dtype)
            for e, expert in enumerate(teacher_experts):
                ensemble_D = ensemble_D + probs_E[e] * ffn(x_TD[t], expert, act)  # Eq. 11
        squared = ((y_TD[t].to(ensemble_D.dtype) - ensemble_D) ** 2).sum()
        losses.append(squared if feature_reduction == "sum" else squared / width)
    return torch.stack(losses).sum() / num_tokens  # Eq. 12
