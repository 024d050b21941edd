"""The plain FFNs of a layer, each on its own rows, as one operation: what experts mostly are.

    y_RD = ffns(x_RD, rooms, experts)       # rows of block i: experts[i](x)

Numbers are those of the experts called one by one, to the bit, under autocast too, where each has weights of its own
(autocast would cast a shared one once, and add its gradients in that precision). What is spared is the rest: one
buffer that all write into instead of a concatenation, forwards and backwards, one cast of the rows, and most of
autograd's steps.

Shape suffixes: R rows, D width, H hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from upcycle_bench.threads import shared

LARGE = 1024  # rows from which on a second thread pays: a tenth of a millisecond to ask it
Gradients = list[tuple[Tensor, Tensor]]  # parameters, and what is to be added to their `.grad`
Begin = Callable[[Callable[[], Gradients]], None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` is computed in: autocast's dtype where it is on."""
    kind = x.device.type
    if x.dtype == torch.float64:  # which autocast leaves alone
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def ffns(x_RD: Tensor, rooms: Sequence[int], experts: Sequence[Any]) -> Tensor:
    """[R, D] -> [R, D] for experts that `expert_backends.as_one` lets pass, with `rooms[i]` rows for experts[i]."""
    if has_torch_function_unary(x_RD):  # `upcycle_bench.deferred` wants to see it
        made: Tensor = handle_torch_function(ffns, (x_RD,), x_RD, rooms, experts)
        return made
    return compute(x_RD, rooms, experts)


def compute(x_RD: Tensor, rooms: Sequence[int], experts: Sequence[Any], begin: Begin | None = None) -> Tensor:
    """The same; autograd leaves the parameters' gradients to `begin`, if given, as work to be done."""
    keeps = torch.is_grad_enabled()  # which a Function does not see
    y_RD: Tensor = _FFNs.apply(x_RD, rooms, experts[0].gelu, begin, keeps, *parameters_of(experts))
    return y_RD


def parameters_of(experts: Sequence[Any]) -> list[Tensor]:
    """W1 [H, D], b1 [H], W2 [D, H], b2 [D] of the first, of the second, ..."""
    return [tensor for one in experts for part in (one.c_fc, one.c_proj) for tensor in (part.weight, part.bias)]


class _FFNs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, rooms: Sequence[int], act: nn.Module, begin: Any, keeps: bool, *parameters: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rooms, ctx.act, ctx.begin, ctx.parameters, ctx.dtype = rooms, act, begin, parameters, x_RD.dtype
        dtype = compute_dtype(x_RD)
        casts = torch.is_autocast_enabled(x_RD.device.type) and dtype != torch.float64
        x_RD = x_RD.to(dtype)
        y_RD = torch.empty_like(x_RD)
        saved: list[Tensor] = [x_RD] * (4 * len(rooms) if keeps else 0)

        @torch.no_grad()
        def one(number: int, x: Tensor, y: Tensor) -> None:
            own = slice(4 * number, 4 * number + 4)
            with as_given(x.device.type):
                w1_HD, b1_H, w2_DH, b2_D = (each.to(dtype) if casts else each for each in parameters[own])
                hidden_RH = torch.addmm(b1_H, x, w1_HD.t())
                active_RH = act(hidden_RH)
                torch.addmm(b2_D, active_RH, w2_DH.t(), out=y)
            if keeps:
                saved[own] = [hidden_RH, active_RH, w1_HD, w2_DH]

        blocks = zip(range(len(rooms)), x_RD.split(rooms), y_RD.split(rooms), strict=True)
        shared([partial(one, *block) for block in blocks], worth=len(x_RD) >= LARGE)
        if keeps:
            ctx.save_for_backward(x_RD, *saved)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor | None) -> tuple[Any, ...]:
        if grad_RD is None:
            return (None,) * (5 + len(ctx.parameters))
        x_RD, *saved = ctx.saved_tensors
        grad_x_RD = torch.empty_like(x_RD)
        wanted, found = ctx.needs_input_grad[5:], []
        blocks = zip(*(rows.split(ctx.rooms) for rows in (x_RD, grad_RD, grad_x_RD)), strict=True)
        for number, (x, grad, grad_x) in enumerate(blocks):
            hidden_RH, active_RH, w1_HD, w2_DH = saved[4 * number : 4 * number + 4]
            grad_RH = _through(ctx.act, hidden_RH, grad @ w2_DH)
            torch.mm(grad_RH, w1_HD, out=grad_x)
            own = slice(4 * number, 4 * number + 4)
            work = _maker(ctx.parameters[own], wanted[own], x, grad_RH, active_RH, grad)
            if ctx.begin is None:
                found += work()
            else:
                ctx.begin(_named(ctx.parameters[own], work))
        grads = found or (None,) * len(ctx.parameters)
        return grad_x_RD.to(ctx.dtype), None, None, None, None, *grads


def as_given(kind: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast. A thread that has none must not enter one: to leave it empties the cache of all threads."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _through(act: Any, hidden_RH: Tensor, grad_RH: Tensor) -> Tensor:
    """The gradient behind an activation."""
    if type(act) is nn.GELU:
        made: Tensor = torch.ops.aten.gelu_backward(grad_RH, hidden_RH, approximate=act.approximate)
        return made
    with torch.enable_grad():
        leaf_RH = hidden_RH.detach().requires_grad_()
        (made,) = torch.autograd.grad(act(leaf_RH), leaf_RH, grad_RH)
    return made


def _maker(
    parameters: Sequence[Tensor], wanted: Sequence[bool], x: Tensor, grad_RH: Tensor, active_RH: Tensor, grad: Tensor
) -> Callable[[], list[Tensor | None]]:
    """The work of making the gradients of an expert's four parameters, those that are wanted."""

    @torch.no_grad()
    def make() -> list[Tensor | None]:
        ways = (
            lambda: grad_RH.t() @ x,
            lambda: grad_RH.sum(0),
            lambda: grad.t() @ active_RH,
            lambda: grad.sum(0),
        )
        return [way().to(of.dtype) if want else None for way, of, want in zip(ways, parameters, wanted, strict=True)]

    return make


def _named(parameters: Sequence[Tensor], work: Callable[[], list[Tensor | None]]) -> Callable[[], Gradients]:
    return lambda: [(of, made) for of, made in zip(parameters, work(), strict=True) if made is not None]
