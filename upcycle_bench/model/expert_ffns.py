"""All experts of a layer as one operation, where they are plain FFNs: each runs on its own block of rows.

    y_RD = expert_ffns(x_RD, block_sizes, experts)        # the rows of block i go through experts[i]

Numbers are those of the experts called one by one, to the bit, under autocast too. It saves the rest: a concatenation
in each direction (all experts write into one buffer), casts of the rows, and most of autograd's steps. No weight may be
shared: autocast would cast it once, and add its gradients in bf16.

Shape suffixes: R rows in blocks by expert, filler rows included (see `dispatch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `x`: autocast's where it is on, else that of x."""
    kind = x.device.type
    if x.dtype == torch.float64:  # which autocast leaves alone
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def expert_ffns(x_RD: Tensor, block_sizes: Sequence[int], experts: Sequence[Any]) -> Tensor:
    """[R, D] -> [R, D], `block_sizes[i]` rows through experts[i]; `backends.as_one` says which experts it can take."""
    keeps = torch.is_grad_enabled()  # within a Function it is always off
    y_RD: Tensor = _ExpertFFNs.apply(x_RD, block_sizes, experts[0].gelu, keeps, *parameters_of(experts))
    return y_RD


def parameters_of(experts: Sequence[Any]) -> list[Tensor]:
    """W1 [H, D], b1 [H], W2 [D, H], b2 [D] of the first expert, then of the second, and so on."""
    return [tensor for one in experts for part in (one.c_fc, one.c_proj) for tensor in (part.weight, part.bias)]


class _ExpertFFNs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, block_sizes: Sequence[int], act: nn.Module, keeps: bool, *parameters: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.block_sizes, ctx.act, ctx.parameters, ctx.dtype = block_sizes, act, parameters, x_RD.dtype
        dtype, kind = compute_dtype(x_RD), x_RD.device.type
        casts = torch.is_autocast_enabled(kind) and dtype != torch.float64
        x_RD = x_RD.to(dtype)
        y_RD = torch.empty_like(x_RD)
        saved: list[Tensor] = []
        with torch.autocast(kind, enabled=False):
            for number, (x, y) in enumerate(zip(x_RD.split(block_sizes), y_RD.split(block_sizes), strict=True)):
                own = parameters[4 * number : 4 * number + 4]
                w1_HD, b1_H, w2_DH, b2_D = (each.to(dtype) if casts else each for each in own)
                hidden_RH = torch.addmm(b1_H, x, w1_HD.t())
                active_RH = act(hidden_RH)
                torch.addmm(b2_D, active_RH, w2_DH.t(), out=y)
                if keeps:
                    saved += [hidden_RH, active_RH, w1_HD, w2_DH]
        if keeps:
            ctx.save_for_backward(x_RD, *saved)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor | None) -> tuple[Any, ...]:
        if grad_RD is None:
            return (None,) * (4 + len(ctx.parameters))
        x_RD, *saved = ctx.saved_tensors
        grad_x_RD = torch.empty_like(x_RD)
        wanted, grads = ctx.needs_input_grad[4:], []
        blocks = zip(*(rows.split(ctx.block_sizes) for rows in (x_RD, grad_RD, grad_x_RD)), strict=True)
        for number, (x, grad, grad_x) in enumerate(blocks):
            own = slice(4 * number, 4 * number + 4)
            hidden_RH, active_RH, w1_HD, w2_DH = saved[own]
            grad_RH = _through(ctx.act, hidden_RH, grad @ w2_DH)
            torch.mm(grad_RH, w1_HD, out=grad_x)
            ways = (
                lambda grad_RH=grad_RH, x=x: grad_RH.t() @ x,
                lambda grad_RH=grad_RH: grad_RH.sum(0),
                lambda grad=grad, active_RH=active_RH: grad.t() @ active_RH,
                lambda grad=grad: grad.sum(0),
            )
            for way, parameter, want in zip(ways, ctx.parameters[own], wanted[own], strict=True):
                grads.append(way().to(parameter.dtype) if want else None)
        return grad_x_RD.to(ctx.dtype), None, None, None, *grads


def _through(act: Any, hidden_RH: Tensor, grad_RH: Tensor) -> Tensor:
    """The gradient of the activation's input, from that of its output."""
    if type(act) is nn.GELU:
        made: Tensor = torch.ops.aten.gelu_backward(grad_RH, hidden_RH, approximate=act.approximate)
        return made
    with torch.enable_grad():
        leaf_RH = hidden_RH.detach().requires_grad_()
        (made,) = torch.autograd.grad(act(leaf_RH), leaf_RH, grad_RH)
    return made
