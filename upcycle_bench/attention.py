"""Self-attention of short sequences, from projected queries, keys and values to mixed values, as one operation.

    mixed_LBD = attend(qkv_LBD, heads)      # F.scaled_dot_product_attention by PyTorch's plain kernel, to the bit

The same operations on the same operands, in float32 where these have 16 bits. What is spared: that kernel asks of each
row of scores whether it sees anything, and makes zeros if not (without a mask that takes scores that overflowed to
-inf, which are NaN here); gradients go straight to where they belong; and half the batch is the spare thread's, where
that is idle.

Shape suffixes: L sequence, B batch, D width, H heads, E width of a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upcycle_bench.ffns import LARGE, as_given
from upcycle_bench.threads import shared


def plain_kernel(device: torch.device) -> bool:
    """Whether PyTorch would take its plain kernel, of products and a softmax: `train.attention_kernel` sees to that."""
    kernels = torch.backends.cuda  # whose name is older than what it stands for
    lower = kernels.fp16_bf16_reduction_math_sdp_allowed()  # in 16 bits, where those are given
    return device.type == "cpu" and kernels.math_sdp_enabled() and not kernels.flash_sdp_enabled() and not lower


def attend(qkv_LBD: Tensor, heads: int) -> Tensor:
    """Values mixed by unmasked attention, [L, B, D], of queries, keys and values [L, B, 3 D], one behind the other."""
    mixed_LBD: Tensor = _Attention.apply(qkv_LBD, heads)
    return mixed_LBD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_LBD: Tensor, heads: int) -> Tensor:
        length, batch, width = qkv_LBD.shape[0], qkv_LBD.shape[1], qkv_LBD.shape[2] // 3
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.scale = heads, math.sqrt(1 / math.sqrt(width // heads))
        ctx.dtype = torch.promote_types(qkv_LBD.dtype, torch.float32)
        mixed_LBD = qkv_LBD.new_empty(length, batch, width)
        parts = 2 if batch > 1 and length * batch >= LARGE else 1
        saved: list[Tensor] = [mixed_LBD] * (4 * parts)

        @torch.no_grad()
        def part(number: int, qkv: Tensor, mixed: Tensor) -> None:
            with as_given(qkv.device.type):
                each = qkv.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4).to(ctx.dtype).unbind()
                query_BHLE, key_BHLE, value_BHLE = each
                query_BHLE, value_BHLE = query_BHLE * ctx.scale, value_BHLE.contiguous()
                key_BHEL = key_BHLE.transpose(-2, -1) * ctx.scale
                weight_BHLL = torch.softmax(query_BHLE @ key_BHEL, -1)
                mixed.unflatten(-1, (heads, -1)).copy_((weight_BHLL @ value_BHLE).permute(2, 0, 1, 3))
            saved[4 * number : 4 * number + 4] = query_BHLE, key_BHEL, value_BHLE, weight_BHLL

        halves = zip(range(parts), qkv_LBD.chunk(parts, 1), mixed_LBD.chunk(parts, 1), strict=True)
        shared([partial(part, *half) for half in halves])
        ctx.save_for_backward(*saved)
        return mixed_LBD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LBD: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_LBD is None:
            return None, None
        saved = ctx.saved_tensors
        parts = len(saved) // 4
        length, batch, width = grad_LBD.shape
        grad_qkv_LBD = grad_LBD.new_empty(length, batch, 3 * width)

        @torch.no_grad()
        def part(number: int, grad: Tensor, into: Tensor) -> None:
            with as_given(grad.device.type):
                query_BHLE, key_BHEL, value_BHLE, weight_BHLL = saved[4 * number : 4 * number + 4]
                grad_BHLE = grad.unflatten(-1, (ctx.heads, -1)).permute(1, 2, 0, 3).to(ctx.dtype)
                into_BHLE = [one.permute(1, 2, 0, 3) for one in into.unflatten(-1, (3, ctx.heads, -1)).unbind(2)]
                into_BHLE[2].copy_(weight_BHLL.transpose(-2, -1) @ grad_BHLE)
                grad_BHLL = torch._softmax_backward_data(
                    grad_BHLE @ value_BHLE.transpose(-2, -1), weight_BHLL, -1, weight_BHLL.dtype
                )
                into_BHLE[0].copy_(grad_BHLL @ key_BHEL.transpose(-2, -1) * ctx.scale)
                # By way of [E, L], as autograd does, which for some L adds up in another order than [L, E] would.
                grad_key_BHEL = query_BHLE.transpose(-2, -1) @ grad_BHLL * ctx.scale
                into_BHLE[1].copy_(grad_key_BHEL.transpose(-2, -1).contiguous())

        halves = zip(range(parts), grad_LBD.chunk(parts, 1), grad_qkv_LBD.chunk(parts, 1), strict=True)
        shared([partial(part, *half) for half in halves])
        return grad_qkv_LBD, None
