"""Symmetric matrices: second moments C of tokens, and the spectrum of W C W^T for a weight W.

    factors = decompose(w_HD)                                   # once a layer: W = Q R
    energy_R, vector_RR, rank = spectrum(factors, c_DD)         # for each cluster
    lost_HD = project(factors, vector_RR[:, :10])               # the part of W along ten eigenvectors

Only lower triangles are computed, by strips of rows. Shape suffixes: R = min(H, D), L some of these directions.
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
    """Add x^T x to the lower triangle of `lower_DD`; the entries above it mean nothing (`symmetric` replaces them).

    Eight strips of rows take 9/16 of the products of the whole square, which saves 8 % of a layer's time at D=768.
    """
    for strip in strips(len(lower_DD)):
        part = lower_DD[strip, : strip.stop]
        torch.addmm(part, x_TD[:, strip].T, x_TD[:, : strip.stop], out=part)  # the counter of FLOPs misses `addmm_`


def congruent(r_RD: Tensor, c_DD: Tensor) -> Tensor:
    """The lower triangle of R C R^T for an upper triangular R and a symmetric C; the entries above it mean nothing.

    By strips that leave out R's zeros, which saves about half of the products.
    """
    product_RD = torch.empty_like(r_RD)
    lower_RR = r_RD.new_zeros(len(r_RD), len(r_RD))
    for strip in strips(len(r_RD)):
        product_RD[strip] = r_RD[strip, strip.start :] @ c_DD[strip.start :]
    for strip in strips(len(r_RD)):
        lower_RR[strip.start :, strip] = product_RD[strip.start :, strip.start :] @ r_RD[strip, strip.start :].T
    return lower_RR


def strips(width: int) -> list[slice]:
    """At most eight strips of a matrix's rows or columns, of 64 or more each; the last has the rest."""
    step = max(64, math.ceil(width / 8))
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def symmetric(lower_DD: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle."""
    return lower_DD.tril() + lower_DD.tril(-1).T


def with_ridge(c_DD: Tensor) -> Tensor:
    """C + 1e-6 tr(C)/D I, which makes a singular C positive definite."""
    return c_DD + 1e-6 * c_DD.trace() / len(c_DD) * torch.eye(len(c_DD)).to(c_DD)


class Factors(NamedTuple):
    """W = Q R, made once for all clusters of a layer, and norm = |W^T W| (Frobenius).

    Q [H, R] is orthonormal, of W's dtype, at least float32. R [R, D] is upper triangular, float64.
    """

    q_HR: Tensor
    r_RD: Tensor
    norm: Tensor


@torch.no_grad()
def decompose(w_HD: Tensor) -> Factors:
    """`Factors` of W, computed in float64.

    Where W is far from losing rank, R is the Cholesky factor of W^T W, which saves 7 % of a layer's time at D=768.
    Its rounding is 1e-16 times the squared condition number: at 1e4 that is still below float32's. Elsewhere a QR is
    made. The diagonal of R bounds the condition number from below only, but Q R = W holds whatever it is.
    """
    w_HD, dtype = w_HD.double(), torch.promote_types(w_HD.dtype, torch.float32)
    square_DD = second_moment(w_HD)
    r_RD, failed = torch.linalg.cholesky_ex(square_DD, upper=True)
    least, most = r_RD.diagonal().aminmax()
    tall = len(w_HD) >= w_HD.shape[1]  # of a wide W, W^T W is singular, and rounding alone could look like rank
    if tall and dtype == torch.float32 and not failed and least > 1e-2 * most:
        parts = [torch.linalg.solve_triangular(r_RD, rows_hD, upper=True, left=False) for rows_hD in w_HD.chunk(8)]
        q_HR = torch.cat(parts)
    else:
        q_HR, r_RD = torch.linalg.qr(w_HD)
    return Factors(q_HR.to(dtype), r_RD, square_DD.norm())


def spectrum(factors: Factors, c_DD: Tensor) -> tuple[Tensor, Tensor, int]:
    """Eigenvalues and eigenvectors of W C W^T = Q (R C R^T) Q^T for a symmetric C [D, D], and how many exceed rounding.

    The eigenvalues [R] are descending and not negative. The eigenvectors [R, R] are columns, those of R C R^T, the one
    of the least eigenvalue first. Rounding is measured by |W^T W| |C|, the norms of the factors. The norm of R C R^T
    would be too small a measure: W can all but ignore the direction in which tokens are longest.
    """
    value_R, vector_RR = torch.linalg.eigh(congruent(factors.r_RD, c_DD))  # ascending; reads the lower triangle
    rounding = factors.norm * c_DD.norm() * len(value_R) * torch.finfo(torch.float64).eps
    energy_R = value_R.flip(0).clamp(min=0)
    return energy_R, vector_RR, int((energy_R > rounding).sum())


def project(factors: Factors, v_RL: Tensor) -> Tensor:
    """U U^T W [H, D] for U = Q V and orthonormal columns V [R, L]; the product that is [H, D] is in Q's dtype."""
    q_HR, r_RD, _ = factors
    parts = [v_RL[: strip.stop].T @ r_RD[: strip.stop, strip] for strip in strips(r_RD.shape[1])]  # without R's zeros
    return (q_HR @ v_RL.to(q_HR)) @ torch.cat(parts, 1).to(q_HR)
