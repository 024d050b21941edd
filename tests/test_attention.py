"""Attention as one operation: PyTorch's plain kernel to the bit, and half the batch in another thread.

Shape suffixes: L sequence, B batch, D width.
"""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from tests.helpers import threads
from upcycle_bench import attention
from upcycle_bench import threads as threads_module
from upcycle_bench.attention import attend, plain_kernel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def pytorchs(qkv_LBD: Tensor, heads: int) -> Tensor:
    length, batch, width = qkv_LBD.shape[0], qkv_LBD.shape[1], qkv_LBD.shape[2] // 3
    each = qkv_LBD.view(length, batch, 3, heads, width // heads).permute(2, 1, 3, 0, 4)
    with sdpa_kernel(SDPBackend.MATH):
        mixed = F.scaled_dot_product_attention(*each.contiguous())
    return mixed.permute(2, 0, 1, 3).reshape(length, batch, width)


def problem(length: int, batch: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(Queries, keys and values; a gradient.)"""
    generator = torch.Generator().manual_seed(length + batch)
    qkv_LBD, grad_LBD = (torch.randn(length, batch, n * width, generator=generator).to(dtype) for n in (3, 1))
    return qkv_LBD.requires_grad_(), grad_LBD


def results(compute: Callable[[Tensor, int], Tensor], qkv_LBD: Tensor, heads: int, grad_LBD: Tensor) -> list[Tensor]:
    mixed_LBD = compute(qkv_LBD, heads)
    return [mixed_LBD, *torch.autograd.grad(mixed_LBD, qkv_LBD, grad_LBD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("large", [1, 10**9])
@pytest.mark.parametrize(("width", "heads"), [(32, 2), (64, 4), (192, 3)])
def test_it_is_pytorchs_to_the_bit(
    dtype: torch.dtype, large: int, width: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LARGE", large)  # in halves, or not
    for length in (1, 2, 5, 9, 10, 17, 26):
        for batch in (1, 2, 7, 64):
            qkv_LBD, grad_LBD = problem(length, batch, width, dtype)
            for ours, theirs in zip(
                results(attend, qkv_LBD, heads, grad_LBD), results(pytorchs, qkv_LBD, heads, grad_LBD), strict=True
            ):
                assert ours.dtype == dtype and torch.equal(ours, theirs), (length, batch)


def test_it_is_the_formula() -> None:
    qkv_LBD, _ = problem(5, 3, 8, torch.float64)
    ours_LBD = attend(qkv_LBD, 2)
    query_LBD, key_LBD, value_LBD = qkv_LBD.detach().split(8, dim=-1)
    for item in range(3):
        for head in (slice(0, 4), slice(4, 8)):
            scores_LL = query_LBD[:, item, head] @ key_LBD[:, item, head].T / math.sqrt(4)
            assert_close(ours_LBD[:, item, head], scores_LL.softmax(1) @ value_LBD[:, item, head])
    assert torch.autograd.gradcheck(lambda qkv_LBD: attend(qkv_LBD, 2), problem(3, 2, 4, torch.float64)[0])


def test_autocast_does_not_reach_into_it() -> None:
    qkv_LBD, grad_LBD = problem(17, 64, 32, torch.bfloat16)
    expected = results(attend, qkv_LBD, 2, grad_LBD)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(attend, qkv_LBD, 2, grad_LBD)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["softmax", "_softmax_backward_data"])
def test_two_threads_take_half_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards; and the other thread leaves autocast's cache alone (a weight is then cast once)."""
    layer, after, grads = torch.nn.Linear(96, 96), torch.nn.Linear(32, 96), []
    x_LBD = problem(17, 64, 32)[0].detach()
    usual, meeting = getattr(torch, name), threading.Barrier(2, timeout=20)

    def met(*args: Any) -> Any:
        meeting.wait()  # both are in their half
        return usual(*args)

    assert attention.LARGE <= 17 * 64
    with ThreadPoolExecutor(1, "other", torch.set_num_threads, (1,)) as other:
        for thread in (None, other):
            monkeypatch.setattr(threads_module, "_spare_thread_if_free", lambda thread=thread: thread)
            if thread is not None:
                monkeypatch.setattr(attention.torch, name, met)  # type: ignore[attr-defined]
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y_LBD = layer(after(attend(layer(x_LBD), 2)))
            y_LBD.float().square().sum().backward()
            grads.append(layer.weight.grad)
    assert grads[0] is not None and grads[1] is not None and torch.equal(*grads)


def test_it_is_for_who_asks_for_the_plain_kernel() -> None:
    cpu = torch.device("cpu")
    assert not plain_kernel(cpu)
    with sdpa_kernel(SDPBackend.MATH):
        assert plain_kernel(cpu)
        assert not plain_kernel(torch.device("cuda"))
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            assert not plain_kernel(cpu)  # which then computes in 16 bits
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert not plain_kernel(cpu)
