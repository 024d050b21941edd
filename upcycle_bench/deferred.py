"""Gradients of weights beside the backward pass: what goes on down the network needs those of the inputs alone.

    later = Later()
    with later.products(thread):                    # of a forward pass in this thread: its `F.linear`s
        image_BD = encode_image(images)
    loss.backward()                                 # goes on without the gradients of their weights and biases,
    later.wait()                                    # which `thread` adds to `.grad`

The same operations in the same precision, so the same gradients to the bit. They come past autograd: a parameter with
hooks is left to it, and nothing may look at `.grad` before `wait` is over. PyTorch's attention is one function, whose
projections are not seen.

Shape suffixes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from upcycle_bench.expert_backends import compute_dtype


class Later:
    """What a thread has still to compute."""

    def __init__(self) -> None:
        self._begun: list[Future[None]] = []

    def products(self, thread: Executor | None) -> contextlib.AbstractContextManager[Any]:
        """A context in which the weights of `F.linear` get their gradients from `thread`; None: from autograd."""
        if thread is None:
            return contextlib.nullcontext()
        return _Products(lambda work: self._begun.append(thread.submit(work)))

    def wait(self) -> None:
        """Until all is computed; raises what went wrong."""
        begun, self._begun = self._begun, []
        for future in begun:
            future.result()


class _Products(TorchFunctionMode):
    def __init__(self, begin: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self.begin = begin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and torch.is_grad_enabled() and _can_wait(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)), self.begin)
        return func(*args, **kwargs)


def _can_wait(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Parameters that train, without hooks, in a precision that autocast gives or leaves alone."""
    for parameter in (weight, bias):
        if parameter is None:
            continue
        plain = isinstance(parameter, nn.Parameter) and parameter.requires_grad and parameter.dtype == torch.float32
        if not plain or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return False
    return x.requires_grad and x.dtype in (torch.float32, torch.bfloat16)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, begin: Callable[[Callable[[], None]], None]
    ) -> Tensor:
        dtype = compute_dtype(x_MK)
        x_MK, ctx.dtype = x_MK.to(dtype), x_MK.dtype
        ctx.parameters, ctx.begin = (weight_NK, bias_N), begin
        with torch.autocast(x_MK.device.type, enabled=False):
            used_NK = weight_NK.to(dtype)
            ctx.save_for_backward(x_MK, used_NK)
            return F.linear(x_MK, used_NK, None if bias_N is None else bias_N.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, None, None, None]:
        x_MK, used_NK = ctx.saved_tensors
        weight_NK, bias_N = ctx.parameters

        @torch.no_grad()
        def of_parameters() -> None:
            rows_MN = grad_MN.reshape(-1, grad_MN.shape[-1])
            _add(weight_NK, rows_MN.t() @ x_MK.reshape(-1, x_MK.shape[-1]))
            if bias_N is not None:
                _add(bias_N, rows_MN.sum(0))

        ctx.begin(of_parameters)
        return (grad_MN @ used_NK).to(ctx.dtype), None, None, None


def _add(parameter: Tensor, grad: Tensor) -> None:
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
