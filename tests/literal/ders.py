"""DeRS, number by number: one expert's matrices, its forward pass, and the compression of trained experts.

A reference for tests, written from arXiv:2503.01359. Torch is used only so that autograd gives gradients.

Shape suffixes: I inputs and O outputs of a matrix, P rank, S places of a sparse delta.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Matrix = list[list[float]]


def low_rank(shared_OI: Tensor, down_PI: Tensor, up_OP: Tensor) -> Tensor:
    """W_i[o, i] = W_shared[o, i] + sum_p up[o, p] down[p, i] (Eq. 3)."""
    rows = []
    for o in range(shared_OI.shape[0]):
        row = []
        for i in range(shared_OI.shape[1]):
            entry = shared_OI[o, i]
            for p in range(down_PI.shape[0]):
                entry = entry + up_OP[o, p] * down_PI[p, i]
            row.append(entry)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def sparse(shared_OI: Tensor, places_S: list[int], values_S: Tensor) -> Tensor:
    """W_i = W_shared, plus values at flat places."""
    width = shared_OI.shape[1]
    rows = []
    for o in range(shared_OI.shape[0]):
        row = []
        for i in range(width):
            entry = shared_OI[o, i]
            for s, place in enumerate(places_S):
                if place == o * width + i:
                    entry = entry + values_S[s]
            row.append(entry)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def forward(
    x_TD: Tensor, w1_HD: Tensor, b1_H: Tensor, w2_DH: Tensor, b2_D: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """W2 act(W1 x + b1) + b2, token by token, [T, D]."""
    rows = []
    for x_D in x_TD:
        hidden = [act(torch.dot(w1_HD[h], x_D) + b1_H[h]) for h in range(len(b1_H))]
        y_D = []
        for d in range(len(b2_D)):
            y = b2_D[d]
            for h in range(len(hidden)):
                y = y + w2_DH[d, h] * hidden[h]
            y_D.append(y)
        rows.append(torch.stack(y_D))
    return torch.stack(rows)


def dare(base: Matrix, weight: Matrix, dropped: list[list[bool]], rate: float) -> Matrix:
    """W_base + (1 - m) Delta / (1 - p)."""
    out = []
    for base_row, row, gone_row in zip(base, weight, dropped, strict=True):
        out.append(
            [b if gone else b + (w - b) / (1 - rate) for b, w, gone in zip(base_row, row, gone_row, strict=True)]
        )
    return out


def nearest(base: Matrix, weight: Matrix, step: float, bits: int) -> Matrix:
    """W_base + the closest to Delta of the 2^bits values step * (odd number)."""
    levels = [step * odd for odd in range(-(2**bits) + 1, 2**bits, 2)]
    out = []
    for base_row, row in zip(base, weight, strict=True):
        out.append([b + min(levels, key=lambda v: abs(v - (w - b))) for b, w in zip(base_row, row, strict=True)])
    return out
