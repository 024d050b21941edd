"""SPRI as reconstructed in `strategies/spri.py`, component by component: the experts' matrices.

A reference for tests. The SVD is numpy's; a singular pair's sign is arbitrary and leaves every product as it is.

Shape suffixes: O outputs, I inputs of a matrix, M singular values.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def groups(tail: list[int], experts: int, partition: str, order: list[int]) -> list[list[int]]:
    """The tail's components (numbers j, descending values) of each expert; `order` shuffles a random partition."""
    out: list[list[int]] = [[] for _ in range(experts)]
    if partition == "interleaved":
        for j in tail:
            out[(j - tail[0]) % experts].append(j)
        return out
    rest = [tail[place] for place in order] if partition == "random" else list(tail)
    for expert in range(experts):  # the first ones get one more where it does not divide
        for _ in range(len(tail) // experts + (expert < len(tail) % experts)):
            out[expert].append(rest.pop(0))
    return out


def kept(s_M: Array, fraction: float, by: str) -> int:
    """r: a share of the number, or the fewest that hold that share of sum s^2."""
    if by == "count":
        return round(fraction * len(s_M))
    total = sum(float(s) ** 2 for s in s_M)
    rank, held = 0, 0.0
    while held < fraction * total and rank < len(s_M):
        held += float(s_M[rank]) ** 2
        rank += 1
    return rank


def experts(
    w_OI: Array,
    *,
    num_experts: int,
    fraction: float,
    by: str = "count",
    partition: str = "interleaved",
    mode: str = "base_plus_residual",
    scale: float = 1.0,
    order: list[int] | None = None,
) -> list[Array]:
    """W_e = B + scale R_e, or W + scale (R_e - (W - B) / E), [O, I] for each expert."""
    u_OM, s_M, vt_MI = np.linalg.svd(w_OI, full_matrices=False)
    rank = kept(s_M, fraction, by)

    def component(j: int) -> Array:
        out = np.zeros_like(w_OI)
        for o in range(w_OI.shape[0]):
            for i in range(w_OI.shape[1]):
                out[o, i] = s_M[j] * u_OM[o, j] * vt_MI[j, i]
        return out

    base_OI = np.zeros_like(w_OI)
    for j in range(rank):
        base_OI += component(j)
    made = []
    for group in groups(list(range(rank, len(s_M))), num_experts, partition, order or []):
        residual_OI = np.zeros_like(w_OI)
        for j in group:
            residual_OI += component(j)
        if mode == "base_plus_residual":
            made.append(base_OI + scale * residual_OI)
        else:
            made.append(w_OI + scale * (residual_OI - (w_OI - base_OI) / num_experts))
    return made
