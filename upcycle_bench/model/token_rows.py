"""Moving token rows between orders by gathers only, forwards and backwards.

PyTorch's own backward of `index_select` is `index_add`, which on a CPU is several times slower than a gather. The
MoE layer knows the inverse of every index it uses, so each backward here is a gather as well.

Shape suffixes: T tokens, R routed rows (and those that pad), D width, K choices per token, C = K * T choices,
N experts. An index equal to the number of rows means "a row of zeros" (a dropped choice, a padding position).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _with_hole(rows_RD: Tensor, has_holes: bool) -> Tensor:
    """The rows as an index may name them: with one more behind them, of zeros, if it has holes."""
    return torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])]) if has_holes else rows_RD


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        index_R: Tensor,
        inverse_KT: Tensor,
        index_holes: bool,
        inverse_holes: bool,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(inverse_KT)
        ctx.inverse_holes, ctx.dtype = inverse_holes, x_TD.dtype
        return _with_hole(x_TD.to(dtype or x_TD.dtype), index_holes).index_select(0, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (inverse_KT,) = ctx.saved_tensors
        grad_RD = _with_hole(grad_RD, ctx.inverse_holes)
        grad_TD = grad_RD.index_select(0, inverse_KT[0]).to(ctx.dtype)
        for inverse_T in inverse_KT[1:]:
            grad_TD += grad_RD.index_select(0, inverse_T).to(ctx.dtype)
        return grad_TD, None, None, None, None, None


def select_rows(
    x_TD: Tensor,
    index_R: Tensor,
    inverse_KT: Tensor,
    *,
    index_holes: bool = False,
    inverse_holes: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_TD[index_R], [R, D]. inverse_KT[k, t] is the k-th row of the result that comes from token t (R if none).

    `*_holes` say that an index contains the zero row. With `dtype` the rows are x's in that precision; gradients are
    still added in x's own.
    """
    return _SelectRows.apply(x_TD, index_R, inverse_KT, index_holes, inverse_holes, dtype)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_KT: Tensor, slots_KT: Tensor, choice_R: Tensor, holes: bool) -> Tensor:
        ctx.save_for_backward(rows_RD, gates_KT, slots_KT, choice_R)
        ctx.holes = holes
        # Gates are float32 or wider, so products and their sum over choices are accumulated in that precision.
        total_TD: Tensor | None = None
        holed_RD = _with_hole(rows_RD, holes)
        for slots_T, gates_T in zip(slots_KT, gates_KT, strict=True):
            part_TD = holed_RD.index_select(0, slots_T).to(gates_KT.dtype).mul_(gates_T.unsqueeze(1))
            total_TD = part_TD if total_TD is None else total_TD.add_(part_TD)
        assert total_TD is not None
        return total_TD.to(rows_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows_RD, gates_KT, slots_KT, choice_R = ctx.saved_tensors
        # Both factors in the gates' precision before they meet: mixed operands take a slow path on a CPU.
        grad_TD = grad_TD.to(gates_KT.dtype)
        num_tokens = len(grad_TD)
        grad_gates_KT = torch.empty_like(gates_KT)
        grad_CD = rows_RD.new_empty(gates_KT.numel() + 1, rows_RD.shape[1])  # by choice; the last: of none
        grad_CD[-1] = 0
        holed_RD = _with_hole(rows_RD, ctx.holes)
        for k, (slots_T, gates_T) in enumerate(zip(slots_KT, gates_KT, strict=True)):
            own_TD = holed_RD.index_select(0, slots_T).to(gates_KT.dtype)
            torch.sum(own_TD.mul_(grad_TD), 1, out=grad_gates_KT[k])
            grad_CD[k * num_tokens : (k + 1) * num_tokens] = grad_TD * gates_T.unsqueeze(1)
        return grad_CD.index_select(0, choice_R), grad_gates_KT, None, None, None


def combine_rows(rows_RD: Tensor, gates_KT: Tensor, slots_KT: Tensor, choice_R: Tensor, *, holes: bool) -> Tensor:
    """y_t = sum_k gates[k, t] * rows[slots[k, t]], [T, D]; slots = R where the choice was dropped, which `holes` says.

    choice_R[r] = k * T + t names the choice that row r holds; K * T: none, a row that pads and moves nothing.
    """
    return _CombineRows.apply(rows_RD, gates_KT, slots_KT, choice_R, holes)
