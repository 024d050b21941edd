"""The precision in which a model computes, and the kernel of its attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upcycle_bench.util.plain import plain


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass: autocast for "bf16", where weights stay float32; else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` is computed in: autocast's dtype where it is on."""
    kind = x.device.type
    if x.dtype == torch.float64:  # which autocast leaves alone
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attention_kernel(device: torch.device, longest: int) -> contextlib.AbstractContextManager[Any]:
    """A context that takes PyTorch's plain attention for short sequences on a CPU; its flash kernel is slow backwards.

    `longest` counts tokens. The bound lies between two measurements in bf16 (docs/performance.md): the plain kernel is
    faster at 77 tokens and slower at 197. It is fixed, so that numbers do not depend on a timing.
    """
    short = device.type == "cpu" and longest <= 128
    return sdpa_kernel(SDPBackend.MATH) if short and not plain() else contextlib.nullcontext()
