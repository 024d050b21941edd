"""Gradients of weights from another thread: autograd's to the bit, added up, and left to it where they must be."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import threads
from upcycle_bench import attention as attention_module
from upcycle_bench import deferred
from upcycle_bench import threads as threads_module
from upcycle_bench.deferred import Later
from upcycle_bench.ffns import ffns
from upcycle_bench.strategy import FFN


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1, "other") as pool:
        yield pool


class Tower(nn.Module):
    """Two matrices, one without bias, behind an input that trains, attention, and two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 5, 8))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        shapes = ((12, 8), (12,), (8, 12), (8,))
        self.experts = nn.ModuleList(FFN(*map(torch.randn, shapes), nn.GELU()).expert() for _ in range(2))

    def forward(self) -> Tensor:
        x_BLD = self.start + self.down(F.gelu(self.up(self.start)))
        y_BLD: Tensor = self.attention(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
        return ffns(y_BLD.flatten(0, 1), [4, 6], self.experts)


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


def test_they_come_from_the_thread_when_one_waits() -> None:
    begun: list[Any] = []

    class Never:
        def submit(self, work: Any) -> Any:
            begun.append(work)
            return threading.Event()

    model, later = tower(), Later()
    with later.products(Never()):  # type: ignore[arg-type]
        loss = model().sum()
    loss.backward()
    assert len(begun) == 6  # up, down, attention's two projections, the experts
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["start"]
    for work in begun:
        for parameter, grad in work():
            assert parameter.grad is None
            parameter.grad = grad
    assert same(gradients(model, False, Later(), None, 0), gradients(tower_of_sum(), False, Later(), None, 0))


def tower_of_sum() -> Tower:
    model = tower()
    model().sum().backward()
    return model


@pytest.mark.parametrize("case", ["frozen", "hooked", "hooked after", "no grad"])
def test_what_is_left_to_autograd(thread: Executor, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, later, seen = tower(), Later(), []
    if case == "frozen":
        model.up.requires_grad_(False)
    elif case == "hooked":
        model.up.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
    elif case == "hooked after":
        model.up.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    else:
        answers: list[bool] = []
        can_wait = deferred._can_wait
        monkeypatch.setattr(deferred, "_can_wait", lambda *args: answers.append(can_wait(*args)) or answers[-1])
        with torch.no_grad(), later.products(thread):
            model()
        assert len(answers) == 3 and not any(answers)  # attention is left to PyTorch as a whole
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


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations, as often as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_attention_is_pytorchs_to_the_bit_by_no_more_products(
    thread: Executor, monkeypatch: pytest.MonkeyPatch, bf16: bool, halves: bool
) -> None:
    """Batch first, so what is projected is transposed; the two halves in two threads."""
    for module in (deferred, attention_module):
        monkeypatch.setattr(module, "LARGE", 1 if halves else 10**9)
    monkeypatch.setattr(threads_module, "_spare_thread_if_free", lambda: thread)
    found: list[dict[str, Tensor]] = []
    products: list[int] = []
    for other in (None, thread):
        torch.manual_seed(0)
        attention, later = nn.MultiheadAttention(32, 2, batch_first=True), Later()
        x_BLD = torch.randn(7, 9, 32, requires_grad=True)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with autocast, sdpa_kernel(SDPBackend.MATH), later.products(other), Operations() as seen:
            y_BLD = attention(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
        y_BLD.float().square().sum().backward()
        later.wait()
        assert x_BLD.grad is not None
        grads = {name: weight.grad for name, weight in attention.named_parameters() if weight.grad is not None}
        assert len(grads) == 4
        found.append({"y": y_BLD, "x": x_BLD.grad, **grads})
        products.append(seen.names.count("bmm"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert products[1] <= (4 if halves else 2) and products[0] == 2  # of both halves, if the thread was late


LAYOUTS = {
    "batch": lambda: torch.randn(5, 6, 12),
    "turned": lambda: torch.randn(6, 5, 12).transpose(0, 1),
    "slice": lambda: torch.randn(5, 6, 24)[..., :12],
    "without the first": lambda: torch.randn(6, 7, 12)[:, 1:],
    "expanded": lambda: torch.randn(1, 6, 12).expand(5, 6, 12),
    "rows": lambda: torch.randn(30, 12),
    "turned rows": lambda: torch.randn(12, 30).t(),
}


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_halved_where_that_leaves_the_bits(
    thread: Executor, monkeypatch: pytest.MonkeyPatch, alike: bool, layout: str, bias: bool
) -> None:
    """Outputs and all gradients are autograd's, whether the spare thread computes half or not."""
    monkeypatch.setattr(deferred, "LARGE", 8)
    monkeypatch.setattr(deferred, "_halves_alike", lambda *_: alike)
    monkeypatch.setattr(threads_module, "_spare_thread_if_free", lambda: thread)
    shared, halves = deferred.shared, []
    monkeypatch.setattr(deferred, "shared", lambda works: (halves.append(len(works)), shared(works))[1])
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 20, bias=bias), LAYOUTS[layout]()
    for bf16 in (False, True):
        found = []
        for other in (thread, None):
            leaf, later = x.detach().requires_grad_(), Later()
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), later.products(other):
                y = layer(leaf)
            y.float().square().sum().backward()
            later.wait()
            found.append([y, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
            # Halves of so few rows may have other bits: that is what `_halves_alike` is asked for.
            torch.testing.assert_close(ours, theirs, rtol=0 if not alike else 0.02, atol=0 if not alike else 1e-4)
    assert halves == ([] if "rows" in layout else [1 + alike] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_whether_halves_have_the_bits_is_tried_once_on_other_numbers(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deferred._halves_alike.cache_clear()
    monkeypatch.setattr(deferred, "LARGE", 8)
    multiplied: list[int] = []
    multiply = deferred._multiply
    monkeypatch.setattr(
        deferred, "_multiply", lambda rows, *rest: (multiplied.append(len(rows)), multiply(rows, *rest))
    )
    weight, bias = torch.randn(20, 12).to(dtype), torch.randn(20).to(dtype) if fused else None
    before = torch.get_rng_state()
    for _ in range(2):
        deferred._product(torch.zeros(5, 6, 12, dtype=dtype), weight, bias)
    assert multiplied[:3] == [30, 18, 12]  # the whole, and what a chunk of three and one of two positions have
    assert sum(multiplied[3:]) == 2 * 30
    assert torch.equal(torch.get_rng_state(), before)
    # Kernels that treat rows apart give other bits; the answer is then no, of numbers that are not all zero.
    deferred._halves_alike.cache_clear()
    monkeypatch.setattr(
        deferred,
        "_multiply",
        lambda rows, weight, bias, y: y.copy_((rows.float() @ weight.float().t() + len(rows)).to(dtype)),
    )
    assert not deferred._halves_alike(30, 18, 12, 20, dtype, fused, 1, "highest")
    deferred._halves_alike.cache_clear()


@pytest.mark.parametrize("case", ["mask", "weights", "dropout", "another key", "no batch"])
def test_attention_that_does_more_is_left_to_pytorch(thread: Executor, case: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5 if case == "dropout" else 0.0)
    x_LBD = torch.randn(5, 8) if case == "no batch" else torch.randn(5, 2, 8)
    x_LBD.requires_grad_()
    key = x_LBD.detach() * 2 if case == "another key" else x_LBD
    mask = torch.full((5, 5), -torch.inf).triu(1) if case == "mask" else None
    found = []
    for other in (thread, None):
        later, attention.in_proj_weight.grad = Later(), None
        torch.manual_seed(1)
        with later.products(other):
            y_LBD, weights = attention(x_LBD, key, key, attn_mask=mask, need_weights=case == "weights")
        assert (weights is not None) == (case == "weights")
        y_LBD.square().sum().backward()
        later.wait()
        found.append((y_LBD, attention.in_proj_weight.grad))
    assert all(torch.equal(ours, pytorchs) for ours, pytorchs in zip(*found, strict=True))


class NoGradient(torch.autograd.Function):
    """Passes values on, and no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("kernels", [[SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]])
def test_where_no_gradient_arrives_none_is_made(thread: Executor, kernels: list[SDPBackend]) -> None:
    """Zeros would let the optimiser's weight decay move a weight that autograd leaves alone."""
    model, later = tower(), Later()
    with sdpa_kernel(kernels), later.products(thread):
        loss = NoGradient.apply(model()).sum() + model.start.sum()
    loss.backward()
    later.wait()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["start"]


def test_a_weight_that_is_also_used_otherwise_gets_both_gradients(thread: Executor) -> None:
    """Autograd adds one, `wait` the other, one after the other in this thread."""
    model, later = tower(), Later()
    with later.products(thread):
        loss = model().square().sum() + model.up.weight.square().sum()
    loss.backward()
    assert torch.equal(model.up.weight.grad, 2 * model.up.weight)  # type: ignore[arg-type]
    later.wait()
    expected = tower()
    (expected().square().sum() + expected.up.weight.square().sum()).backward()
    torch.testing.assert_close(model.up.weight.grad, expected.up.weight.grad)


def test_bf16_without_autocast_is_refused_as_ever(thread: Executor) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    with Later().products(thread), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_an_error_arrives_at_who_waits_and_nothing_comes_late(thread: Executor) -> None:
    later, parameter, begun = Later(), nn.Parameter(torch.zeros(1)), threading.Event()

    def late() -> list[tuple[Tensor, Tensor]]:
        begun.set()
        time.sleep(0.1)
        return [(parameter, torch.ones(1))]

    works: list[Any] = [lambda: 1 // 0, late, late]
    later._begun += [([work], thread.submit(work)) for work in works]
    begun.wait(5)
    with pytest.raises(ZeroDivisionError):
        later.wait()
    assert parameter.grad is None and thread.submit(int).result(5) == 0  # nothing is left to do
    later.wait()
    assert parameter.grad is None


def test_who_waits_does_what_the_thread_has_not_begun(thread: Executor) -> None:
    """And gradients are added in the order of the backward pass all the same."""
    later, parameter, go_on, where = Later(), nn.Parameter(torch.zeros(1)), threading.Event(), []

    def work(number: int) -> list[tuple[Tensor, Tensor]]:
        where.append((number, threading.current_thread() is threading.main_thread()))
        if number == 0:
            go_on.wait(5)
        if number == 1:
            go_on.set()
        return [(parameter, torch.tensor([(1.0, 1.0, 2.0**24)[number]]))]

    for number in range(3):
        later._begun.append(([partial(work, number)], thread.submit(work, number)))
    later.wait()
    assert sorted(where) == [(0, False), (1, True), (2, True)]
    # float32 has no odd numbers from 2**24 on: in the other order either 1 would be lost
    assert parameter.grad is not None and parameter.grad.item() == 2**24 + 2
