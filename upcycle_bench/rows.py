"""Moving token rows between orders by gathers only, forwards and backwards.

PyTorch's own backward of `index_select` is `index_add`, which on a CPU is several times slower than a gather. The
MoE layer knows the inverse of every index it uses, so each backward here is a gather as well.

Shape suffixes: T tokens, R routed rows, D width, K choices per token. An index equal to the number of rows means
"a row of zeros" (a dropped choice, a padding position).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _gather(rows_RD: Tensor, index_T: Tensor, has_holes: bool) -> Tensor:
    if has_holes:
        rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
    return rows_RD.index_select(0, index_T)


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, index_R: Tensor, inverse_KT: Tensor, index_holes: bool, inverse_holes: bool
    ) -> Tensor:
        ctx.save_for_backward(inverse_KT)
        ctx.inverse_holes = inverse_holes
        return _gather(x_TD, index_R, index_holes)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inverse_KT,) = ctx.saved_tensors
        grad_TD = _gather(grad_RD, inverse_KT[0], ctx.inverse_holes)
        for inverse_T in inverse_KT[1:]:
            grad_TD += _gather(grad_RD, inverse_T, ctx.inverse_holes)
        return grad_TD, None, None, None, None


def select_rows(
    x_TD: Tensor, index_R: Tensor, inverse_KT: Tensor, *, index_holes: bool = False, inverse_holes: bool = False
) -> Tensor:
    """x_TD[index_R], [R, D]. inverse_KT[k, t] is the k-th row of the result that comes from token t (R if none).

    `*_holes` say that an index contains the zero row.
    """
    return _SelectRows.apply(x_TD, index_R, inverse_KT, index_holes, inverse_holes)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_KT: Tensor, slots_KT: Tensor, source_R: Tensor, holes: bool) -> Tensor:
        ctx.save_for_backward(rows_RD, gates_KT, source_R)
        # Gates are float32 or wider, so products and their sum over choices are accumulated in that precision.
        y_TD = _gather(rows_RD, slots_KT[0], holes) * gates_KT[0].unsqueeze(1)
        for slots_T, gates_T in zip(slots_KT[1:], gates_KT[1:], strict=True):
            y_TD = y_TD + _gather(rows_RD, slots_T, holes) * gates_T.unsqueeze(1)
        return y_TD.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows_RD, gates_KT, source_R = ctx.saved_tensors
        num_tokens = gates_KT.shape[1]
        grad_RD = grad_TD.index_select(0, source_R % num_tokens)  # source_R = k * T + t
        gates_R = gates_KT.reshape(-1).index_select(0, source_R)
        grad_gates_KT = torch.zeros_like(gates_KT)
        products_R = (grad_RD.to(gates_KT.dtype) * rows_RD).sum(1)
        grad_gates_KT.view(-1).index_copy_(0, source_R, products_R)
        return (grad_RD * gates_R.unsqueeze(1)).to(rows_RD.dtype), grad_gates_KT, None, None, None


def combine_rows(rows_RD: Tensor, gates_KT: Tensor, slots_KT: Tensor, source_R: Tensor) -> Tensor:
    """y_t = sum_k gates[k, t] * rows[slots[k, t]], [T, D]; slots = R where the choice was dropped.

    source_R[r] = k * T + t names the choice that row r holds.
    """
    return _CombineRows.apply(rows_RD, gates_KT, slots_KT, source_R, len(source_R) < slots_KT.numel())
