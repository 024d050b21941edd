"""In which precision, and by which attention kernel, a model computes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on float32 weights, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def attention_kernel(device: torch.device, longest: int) -> contextlib.AbstractContextManager[Any]:
    """Plain matmul-softmax attention for short sequences on a CPU, where the flash kernel's backward is slow.

    The bound is a measurement (docs/performance.md: in bf16 the plain kernel pays up to 77 tokens and not from 197).
    It is fixed, so that numbers do not depend on a timing.
    """
    plain = device.type == "cpu" and longest <= 128
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def longest_sequence(model: Any) -> int:
    """The longer of the image's tokens and the text's."""
    return max(len(model.visual.positional_embedding), model.context_length)
