"""Gradients of weights from another thread: autograd's to the bit, added up, and left to it where they must be."""

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import threads
from upcycle_bench.deferred import Later


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1, "other") as pool:
        yield pool


class Tower(nn.Module):
    """Two matrices, one without bias, behind an input that trains, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 5, 8))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self) -> Tensor:
        x_BLD = self.start + self.down(F.gelu(self.up(self.start)))
        y_BLD: Tensor = self.attention(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
        return y_BLD


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def gradients(
    model: Tower, bf16: bool, later: Later, thread: Executor | None, passes: int = 2
) -> dict[str, Tensor | None]:
    for _ in range(passes):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), later.products(thread):
            y_BLD = model()
        y_BLD.float().square().sum().backward()
        later.wait()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items() if value is not None) and [
        name for name, value in one.items() if value is None
    ] == [name for name, value in other.items() if value is None]


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_autograds_to_the_bit_and_add_up(thread: Executor, bf16: bool) -> None:
    expected = gradients(tower(), bf16, Later(), None)
    assert all(value is not None and value.abs().sum() > 0 for value in expected.values())
    assert same(gradients(tower(), bf16, Later(), thread), expected)


def test_they_come_from_the_thread_when_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []

    class Never:
        def submit(self, work: Any) -> Any:
            begun.append(work)
            return threading.Event()

    model, later, never = tower(), Later(), Never()
    with later.products(never):  # type: ignore[arg-type]
        loss = model().sum()
    loss.backward()
    assert len(begun) == 2  # up and down; PyTorch's attention is one function
    assert model.start.grad is not None and model.up.weight.grad is None and model.down.weight.grad is None
    for work in begun:
        work()
    assert same(gradients(model, False, Later(), None, 0), gradients(tower_of_sum(), False, Later(), None, 0))


def tower_of_sum() -> Tower:
    model = tower()
    model().sum().backward()
    return model


@pytest.mark.parametrize("case", ["frozen", "hooked", "hooked after", "no grad"])
def test_what_is_left_to_autograd(thread: Executor, case: str) -> None:
    model, later, seen = tower(), Later(), []
    if case == "frozen":
        model.up.requires_grad_(False)
    elif case == "hooked":
        model.up.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
    elif case == "hooked after":
        model.up.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    else:
        with torch.no_grad(), later.products(thread):
            assert not model().requires_grad
        return
    with later.products(thread):
        loss = model().sum()
    loss.backward()
    later.wait()
    expected = tower_of_sum().up.weight.grad
    assert expected is not None
    if case == "frozen":
        assert model.up.weight.grad is None and model.down.weight.grad is not None
    else:
        assert len(seen) == 1
        assert model.up.weight.grad is not None
        assert torch.equal(model.up.weight.grad, expected * (2 if case == "hooked" else 1))


def test_an_error_arrives_at_who_waits(thread: Executor) -> None:
    later = Later()
    later._begun.append(thread.submit(lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        later.wait()
    later.wait()
