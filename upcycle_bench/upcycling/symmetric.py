"""Symmetric matrices: second moments of tokens, and the spectrum of W C W^T for a weight W and a second moment C.

Shape suffixes: R = min(H, D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def second_moment(x_TD: Tensor) -> Tensor:
    """x^T x [D, D], symmetric to the bit."""
    lower_DD = x_TD.new_zeros(x_TD.shape[1], x_TD.shape[1])
    add_second_moment(lower_DD, x_TD)
    return symmetric(lower_DD)


@torch.no_grad()
def add_second_moment(lower_DD: Tensor, x_TD: Tensor) -> None:
    """Add x^T x to the lower triangle of `lower_DD`; what is above it is of no meaning (`symmetric`).

    By strips of rows: eight of them take 9/16 of the products of the square, 8 % of a layer's time at D=768.
    """
    for strip in strips(len(lower_DD)):
        part = lower_DD[strip, : strip.stop]
        torch.addmm(part, x_TD[:, strip].T, x_TD[:, : strip.stop], out=part)  # FLOPs of `addmm_` are not counted


def congruent(r_RD: Tensor, c_DD: Tensor) -> Tensor:
    """R C R^T for an upper triangular R and a symmetric C: its lower triangle; what is above it is of no meaning.

    By strips, without R's zeros: about half of the products.
    """
    product_RD = torch.empty_like(r_RD)
    lower_RR = r_RD.new_zeros(len(r_RD), len(r_RD))
    for strip in strips(len(r_RD)):
        product_RD[strip] = r_RD[strip, strip.start :] @ c_DD[strip.start :]
    for strip in strips(len(r_RD)):
        lower_RR[strip.start :, strip] = product_RD[strip.start :, strip.start :] @ r_RD[strip, strip.start :].T
    return lower_RR


def strips(width: int) -> list[slice]:
    """At most eight strips of a matrix, of 64 rows or columns or more; the last has what is left."""
    step = max(64, math.ceil(width / 8))
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def symmetric(lower_DD: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle."""
    return lower_DD.tril() + lower_DD.tril(-1).T


def with_ridge(c_DD: Tensor) -> Tensor:
    """C + 1e-6 tr(C)/D I."""
    return c_DD + 1e-6 * c_DD.trace() / len(c_DD) * torch.eye(len(c_DD)).to(c_DD)


class Factors(NamedTuple):
    """W = Q R, once for all clusters of a layer, and |W^T W| (Frobenius).

    Q [H, R] is orthonormal, in W's precision, but at least float32. R [R, D] is upper triangular, float64.
    """

    q_HR: Tensor
    r_RD: Tensor
    norm: Tensor


@torch.no_grad()
def decompose(w_HD: Tensor) -> Factors:
    """`Factors` of W, computed in float64.

    R is the Cholesky factor of W^T W where W is far from losing rank, which takes 7 % less of a layer's time at D=768
    than a QR: at a condition number of 1e4 its rounding, 1e-16 times that squared, is still below float32's.
    Elsewhere it is a QR's. The diagonal of R bounds the condition number from below only: Q R = W holds whatever it is.
    """
    w_HD, dtype = w_HD.double(), torch.promote_types(w_HD.dtype, torch.float32)
    square_DD = second_moment(w_HD)
    r_RD, failed = torch.linalg.cholesky_ex(square_DD, upper=True)
    least, most = r_RD.diagonal().aminmax()
    tall = len(w_HD) >= w_HD.shape[1]  # else rounding alone could pass for rank
    if tall and dtype == torch.float32 and not failed and least > 1e-2 * most:
        parts = [torch.linalg.solve_triangular(r_RD, rows_hD, upper=True, left=False) for rows_hD in w_HD.chunk(8)]
        q_HR = torch.cat(parts)
    else:
        q_HR, r_RD = torch.linalg.qr(w_HD)
    return Factors(q_HR.to(dtype), r_RD, square_DD.norm())


def spectrum(factors: Factors, c_DD: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of W C W^T = Q (R C R^T) Q^T, for a symmetric C [D, D]: eigenvalues, eigenvectors, how many are above rounding.

    The eigenvalues [R] are descending, not negative; eigenvectors [R, R], of R C R^T, are columns, of the least one
    first. Rounding is that of matrices whose norms multiply to |W^T W| |C|. The norm of R C R^T would not do: W can
    all but ignore the direction in which tokens are longest, and R C R^T then hides the rounding of its own product.
    """
    value_R, vector_RR = torch.linalg.eigh(congruent(factors.r_RD, c_DD))  # ascending; of the lower triangle
    rounding = factors.norm * c_DD.norm() * len(value_R) * torch.finfo(torch.float64).eps
    energy_R = value_R.flip(0).clamp(min=0)
    return energy_R, vector_RR, int((energy_R > rounding).sum())


def project(factors: Factors, v_RL: Tensor) -> Tensor:
    """U U^T W [H, D] for U = Q V with orthonormal columns V [R, L]; the products of [H, D] are in Q's precision."""
    q_HR, r_RD, _ = factors
    parts = [v_RL[: strip.stop].T @ r_RD[: strip.stop, strip] for strip in strips(r_RD.shape[1])]  # without R's zeros
    return (q_HR @ v_RL.to(q_HR)) @ torch.cat(parts, 1).to(q_HR)
