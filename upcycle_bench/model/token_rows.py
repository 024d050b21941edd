"""Token rows in another order, and back: gathers alone, in the forward and in the backward pass.

PyTorch's backward of `index_select` is `index_add`, which on a CPU is several times slower than a gather. The caller
knows the inverse of every index it uses, so that each backward pass here is a gather as well.

An index may have holes: an entry equal to the number of rows means a row of zeros (a dropped choice, text padding).

Shape suffixes: R rows, filler rows included (see `dispatch`); M = K * T choices, choice k * T + t being the k-th of
token t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _with_hole(rows_RD: Tensor, has_holes: bool) -> Tensor:
    """The rows, and behind them a row of zeros if the index has holes."""
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
    """x_TD[index_R], [R, D]; inverse_KT[k, t] is the k-th row of the result that comes from token t, R if none.

    `index_holes` and `inverse_holes` say whether that index may have holes. With `dtype` the rows are cast to it; their
    gradients are still added up in the dtype of x.
    """
    return _SelectRows.apply(x_TD, index_R, inverse_KT, index_holes, inverse_holes, dtype)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_KT: Tensor, slots_KT: Tensor, choice_R: Tensor, holes: bool) -> Tensor:
        ctx.save_for_backward(rows_RD, gates_KT, slots_KT, choice_R)
        ctx.holes = holes
        # Gates are float32 or wider: products are taken and added up in their precision.
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
        # Cast before the products: operands of two dtypes take a slow path on a CPU.
        grad_TD = grad_TD.to(gates_KT.dtype)
        num_tokens = len(grad_TD)
        grad_gates_KT = torch.empty_like(gates_KT)
        grad_MD = rows_RD.new_empty(gates_KT.numel() + 1, rows_RD.shape[1])  # the last row is that of filler rows
        grad_MD[-1] = 0
        holed_RD = _with_hole(rows_RD, ctx.holes)
        for k, (slots_T, gates_T) in enumerate(zip(slots_KT, gates_KT, strict=True)):
            own_TD = holed_RD.index_select(0, slots_T).to(gates_KT.dtype)
            torch.sum(own_TD.mul_(grad_TD), 1, out=grad_gates_KT[k])
            grad_MD[k * num_tokens : (k + 1) * num_tokens] = grad_TD * gates_T.unsqueeze(1)
        return grad_MD.index_select(0, choice_R), grad_gates_KT, None, None, None


def combine_rows(rows_RD: Tensor, gates_KT: Tensor, slots_KT: Tensor, choice_R: Tensor, *, holes: bool) -> Tensor:
    """y_t = sum_k gates[k, t] * rows[slots[k, t]], [T, D]: the outputs of each token's experts, weighted.

    slots_KT is R where a choice was dropped; `holes` says whether one was. choice_R is its inverse: the choice that
    each row holds, M for a filler row, which has no effect.
    """
    return _CombineRows.apply(rows_RD, gates_KT, slots_KT, choice_R, holes)
