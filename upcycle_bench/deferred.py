"""Gradients of weights beside the backward pass: what goes on down the network needs those of the inputs alone.

    later = Later()
    with later.products(thread):                    # of a forward pass in this thread: its `F.linear`s, plain experts
        image_BD = encode_image(images)             # and the projections of self-attention
    loss.backward()                                 # goes on without the gradients of their weights and biases,
    later.wait()                                    # which `thread` computes, and which are added to `.grad` here

The same operations in the same precision, so the same gradients to the bit where a forward pass uses a weight once (the
gradients of a weight that it uses again are added in another order, and in float32). They come past autograd: a weight
that has hooks in the forward pass is left to it, nothing sees `.grad` before `wait`, and a tower that checkpoints its
activations cannot be computed so. Until the thread comes to them, gradients of outputs are kept, up to all of a pass.

Shape suffixes: L sequence, B batch, D width.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from upcycle_bench.attention import attend, plain_kernel
from upcycle_bench.ffns import LARGE, Begin, Gradients, compute, compute_dtype, ffns, parameters_of
from upcycle_bench.threads import shared


class Later:
    """What a thread has still to compute."""

    def __init__(self) -> None:
        # Work is taken out of its list by who does it, which lets go of the tensors that it needs.
        self._begun: list[tuple[list[Callable[[], Gradients]], Future[Gradients]]] = []

    def products(self, thread: Executor | None) -> contextlib.AbstractContextManager[Any]:
        """A context in which weights get their gradients from `thread`; None: from autograd."""
        if thread is None:
            return contextlib.nullcontext()

        def begin(work: Callable[[], Gradients]) -> None:
            given = [work]
            self._begun.append((given, thread.submit(lambda: given.pop()())))

        return _Products(begin)

    @torch.no_grad()
    def wait(self) -> None:
        """Add all gradients, once they are computed; raises what went wrong, and then adds no more.

        What the thread has not begun is computed here, from the end.
        """
        try:
            here = {n: given.pop()() for n, (given, future) in reversed([*enumerate(self._begun)]) if future.cancel()}
            for number, (_, future) in enumerate(self._begun):
                for parameter, grad in here[number] if number in here else future.result():
                    if parameter.grad is None:
                        parameter.grad = grad
                    else:
                        parameter.grad += grad
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop what is not added yet, after an error."""
        begun, self._begun = self._begun, []
        left = [future for _, future in begun if not future.cancel()]
        for given, _ in begun:
            given.clear()
        concurrent.futures.wait(left)


class _Products(TorchFunctionMode):
    def __init__(self, begin: Begin) -> None:
        super().__init__()
        self.begin = begin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs:
            x, weight, bias = [*args, None][:3]
            if _can_wait(x, [weight] if bias is None else [weight, bias]) and weight.dim() == 2:
                return _Linear.apply(x, weight, bias, self.begin)
        elif func is ffns and not kwargs:
            x_RD, rooms, experts = args
            if _can_wait(x_RD, parameters_of(experts)):
                return compute(x_RD, rooms, experts, self.begin)
        elif func is F.multi_head_attention_forward:
            with self:  # which is not in force in here
                attended = _self_attention(*args, **kwargs)
            if attended is not None:
                return attended, None
        return func(*args, **kwargs)


def _can_wait(x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Parameters that train, without hooks, in a precision that autocast gives or leaves alone."""
    lower = x.dtype == torch.bfloat16 and torch.is_autocast_enabled(x.device.type)
    if not (torch.is_grad_enabled() and x.requires_grad and (lower or x.dtype == torch.float32)):
        return False
    return all(map(_trains_unseen, parameters))


def _trains_unseen(parameter: Any) -> bool:
    plain = isinstance(parameter, nn.Parameter) and parameter.requires_grad and parameter.dtype == torch.float32
    return plain and not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, begin: Begin) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameters, ctx.begin, ctx.dtype, ctx.shape = (weight, bias), begin, x.dtype, x.shape
        dtype = compute_dtype(x)
        used, added = weight.to(dtype), None if bias is None else bias.to(dtype)
        if x.dim() > 2:
            y, rows = _product(x, used, added)
        else:
            with torch.autocast(x.device.type, enabled=False):
                rows = x.to(dtype)
                y = F.linear(rows, used, added)
        ctx.save_for_backward(rows, used)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        x_rows, used = ctx.saved_tensors
        weight, bias = ctx.parameters

        @torch.no_grad()
        def of_parameters() -> Gradients:
            rows = grad.reshape(-1, grad.shape[-1])
            found = [(weight, (rows.t() @ x_rows).to(weight.dtype))]
            return found if bias is None else [*found, (bias, rows.sum(0).to(bias.dtype))]

        ctx.begin(of_parameters)
        grad_x = (grad.reshape(-1, grad.shape[-1]) @ used).view(ctx.shape)
        return grad_x.to(ctx.dtype), None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(F.linear(x, weight, bias), the rows of x in the weight's precision) for x of three dimensions or more.

    Half of it in the spare thread, if that is idle and halves have the bits of the whole.
    """
    dtype, width = weight.dtype, x.shape[-1]
    copied = x.dtype != dtype or not x.is_contiguous()
    rows = torch.empty(x.shape, dtype=dtype, device=x.device) if copied else x
    # A cast keeps strides that leave no gaps. What F.linear then does with a gradient, and not without one, when it
    # makes a product of each position, many times slower: all rows at once, and the bias afterwards.
    strided = not x.is_contiguous() and (x.dtype == dtype or torch.ops.aten.is_non_overlapping_and_dense(x))
    fused = bias is not None and not strided
    y = torch.empty(*x.shape[:-1], len(weight), dtype=dtype, device=x.device)

    @torch.no_grad()
    def part(x: Tensor, rows: Tensor, y: Tensor) -> None:
        if copied:
            rows.copy_(x)
        y = y.view(-1, len(weight))
        _multiply(rows.view(-1, width), weight, bias if fused else None, y)
        if bias is not None and not fused:
            y.add_(bias)

    count, first = x.shape[:-1].numel(), -(-len(x) // 2) * x.shape[1:-1].numel()
    state = torch.get_num_threads(), torch.get_float32_matmul_precision()
    alike = count >= LARGE and _halves_alike(count, first, width, len(weight), dtype, fused, *state)
    shared([partial(part, *each) for each in zip(*(whole.chunk(1 + alike) for whole in (x, rows, y)), strict=True)])
    return y, rows.view(-1, width)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=y)
    else:
        torch.addmm(bias, rows, weight.t(), out=y)


@functools.cache
def _halves_alike(
    count: int, first: int, width: int, outputs: int, dtype: torch.dtype, fused: bool, threads: int, precision: str
) -> bool:
    """Whether a product of `count` rows and one each of the `first` and the others have the same bits.

    That is a matter of the library's kernels for these shapes. Tried on numbers of its own, once a process.
    """
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((count, width), (outputs, width), (outputs,))
    )
    whole, parts = rows.new_empty(count, outputs), rows.new_empty(count, outputs)
    with torch.no_grad():
        _multiply(rows, weight, bias if fused else None, whole)
        for some in (slice(first), slice(first, None)):
            _multiply(rows[some], weight, bias if fused else None, parts[some])
    return torch.equal(whole, parts)


def _self_attention(
    query_LBD: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    *more: Any,
    average_attn_weights: bool = True,
    **others: Any,
) -> Tensor | None:
    """What `F.multi_head_attention_forward` computes, by its own operations, so to the bit; None where it does more."""
    same = query_LBD is key is value and weight is not None and bias_k is None and bias_v is None
    masked = key_padding_mask is not None or attn_mask is not None
    random = training and dropout > 0
    special = more or any(value is not None and value is not False for value in others.values())
    if not same or masked or random or special or need_weights or add_zero_attn or query_LBD.dim() != 3:
        return None
    if not torch.is_grad_enabled():
        return None
    assert weight is not None
    qkv_LBD = F.linear(query_LBD, weight, bias)
    mixed_LBD = attend(qkv_LBD, heads) if plain_kernel(qkv_LBD.device) else _mixed(qkv_LBD, heads)
    return F.linear(mixed_LBD, out_weight, out_bias)


def _mixed(qkv_LBD: Tensor, heads: int) -> Tensor:
    """Values mixed by attention, [L, B, D], of queries, keys and values [L, B, 3 D]."""
    length, batch, width = qkv_LBD.shape[0], qkv_LBD.shape[1], qkv_LBD.shape[2] // 3
    parts = [
        each.view(length, batch * heads, width // heads).transpose(0, 1).view(batch, heads, length, width // heads)
        for each in qkv_LBD.unflatten(-1, (3, width)).movedim(-2, 0).contiguous().unbind()
    ]
    return F.scaled_dot_product_attention(*parts).permute(2, 0, 1, 3).reshape(length, batch, width)
