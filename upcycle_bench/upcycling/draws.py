"""Random numbers and singular vectors from which strategies make experts: the same on every machine and device.

Each draw has a stream of its own. It is made in float64 on the CPU, then rounded once to the weight's dtype.

    order_H = draws.permutation(ffn.hidden, rng.child("order"))
    w1_HD = draws.redrawn(ffn.w1_HD, rng.child("w1"))

Shape suffixes: O outputs and I inputs of a matrix, M singular values, min(O, I).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upcycle_bench.util.rng import Stream


def permutation(count: int, rng: Stream) -> Tensor:
    """The numbers from 0 to `count` - 1 in a random order, int64 [count]."""
    return torch.randperm(count, generator=rng.generator())


def normal(shape: Sequence[int], rng: Stream) -> Tensor:
    """Numbers of N(0, 1), float64 of that shape."""
    return torch.randn(tuple(shape), generator=rng.generator(), dtype=torch.float64)


def uniform(shape: Sequence[int], rng: Stream) -> Tensor:
    """Numbers of U(-1, 1), float64 of that shape."""
    return torch.rand(tuple(shape), generator=rng.generator(), dtype=torch.float64) * 2 - 1


def mean_and_std(weight: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (over n - 1) of all numbers of a tensor; of fewer than two the deviation is 0."""
    numbers = weight.double().cpu().numpy()  # PyTorch's sums depend on the number of threads, NumPy's do not
    if numbers.size < 2:
        return float(numbers.sum()), 0.0
    return float(numbers.mean()), float(numbers.std(ddof=1))


def redrawn(weight: Tensor, rng: Stream, rows: int | None = None) -> Tensor:
    """Normal numbers with the mean and the standard deviation of `weight`, in its shape or with `rows` rows."""
    mean, std = mean_and_std(weight)
    shape = weight.shape if rows is None else (rows, *weight.shape[1:])
    return (mean + std * normal(shape, rng)).to(weight)


def noisy(weight: Tensor, std: float, rng: Stream) -> Tensor:
    """`weight` plus N(0, std^2); the tensor itself where `std` is 0."""
    return weight if std == 0 else (weight.double().cpu() + std * normal(weight.shape, rng)).to(weight)


def svd(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, M], s [M] (descending) and V^T [M, I] with W = U diag(s) V^T.

    The sign of a pair of singular vectors is free; here the entry of largest size in each column of U is positive.
    LAPACK's rounding depends on the number of threads. `make_experts` calls `Strategy.init_layer` on one thread.
    """
    u_OM, s_M, vt_MI = torch.linalg.svd(weight_OI, full_matrices=False)
    sign_M = u_OM.gather(0, u_OM.abs().argmax(0)[None])[0].sign()
    return u_OM * sign_M, s_M, vt_MI * sign_M[:, None]
