"""FLOPs counted while the work is done: matrix products, convolutions and attention, 2 per multiply-add.

    with counted_flops() as counter: ...
    counter.get_total_flops()

The formulas are those of PyTorch's FlopCounterMode, and so is the count (tested). That class also keeps a count for
each module and asks each operation at each call whether it is made of others, which costs a small model's evaluation
several times what is done here.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

COUNTING_RULE = (
    "matrix multiplications, convolutions and attention at 2 FLOPs per multiply-add; training, also in preparation: at "
    "most seven evenly spaced steps are counted and extrapolated; batches of an evaluation set's "
    "images count as the first of their size did; all else is counted whole; clustering and decompositions are not"
)


class FlopCounter(TorchDispatchMode):
    """Counts what runs inside `with`, on any device, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self._formulas = flop_formulas()
        self._whole: set[Any] = set()  # operations that are not made of others
        self._total = 0

    def __enter__(self) -> FlopCounter:
        _active.counters.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.counters.pop()

    def get_total_flops(self) -> int:
        """FLOPs so far; the name is that of PyTorch's counter."""
        return self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # operators that take functions, and are not counted
            return NotImplemented
        if func not in self._whole:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
            self._whole.add(func)
        out = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self._total += formula(*args, **kwargs, out_val=out)
        return out


class _Active(threading.local):
    """Dispatch modes watch one thread, and so do the counters (though modes go with a graph to a GPU's thread)."""

    def __init__(self) -> None:
        self.counters: list[FlopCounter] = []


_active = _Active()


def counting() -> bool:
    """Whether FLOPs are counted just now, in this thread: work that only fills up shapes is then left out."""
    return bool(_active.counters)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Stop the active counters: for many small operations of which none counts, as those that prepare an image.

    Where another dispatch mode is active within them they go on, since they cannot be left then. No generator may
    yield inside.
    """
    paused = _active.counters[::-1] if _innermost() else []
    for counter in paused:
        counter.__exit__(None, None, None)
    try:
        yield
    finally:
        for counter in reversed(paused):
            counter.__enter__()


@contextlib.contextmanager
def counted_once(known: dict[Hashable, int], kind: Hashable) -> Iterator[None]:
    """Work whose FLOPs its kind determines: watched the first time, which costs a tenth of it, and `known` afterwards.

    From the second time on it runs `uncounted`, and each active counter is given what the first time counted; what
    ends in an error counts nothing. Each time is watched where another dispatch mode is active within the counters.
    """
    counters = tuple(_active.counters)
    if not counters or not _innermost():
        yield
        return
    with uncounted(), contextlib.nullcontext() if kind in known else FlopCounter() as own:
        yield
    if own is not None:
        known[kind] = own.get_total_flops()
    for counter in counters:
        counter._total += known[kind]


def _innermost() -> bool:
    """Whether no other dispatch mode is active within this thread's counters."""
    counters = _active.counters
    return not counters or _get_current_dispatch_mode_stack()[-len(counters) :] == counters


@functools.cache
def flop_formulas() -> dict[Any, Callable[..., int]]:
    """PyTorch's formulas by operation, and those that it lacks: of the CPU's attention kernel, as for the others'.

    And of grouped products: whichever operand is cut into groups, all its parts together make one whole product.
    """
    from torch.utils.flop_counter import (  # brings Triton with it: not for `list`
        flop_registry,
        sdpa_backward_flop_count,
        sdpa_flop_count,
        shape_wrapper,
    )

    aten = torch.ops.aten
    ours: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda out, q, k, v, *rest, **more: sdpa_backward_flop_count(out, q, k, v)
        ),
    }
    if hasattr(aten, "_grouped_mm"):
        ours[aten._grouped_mm] = lambda a, b, *rest, **more: 2 * a[-2] * a[-1] * b[-1]
    return {**flop_registry, **{operation: shape_wrapper(formula) for operation, formula in ours.items()}}


@contextlib.contextmanager
def counted_flops() -> Iterator[FlopCounter]:
    """The counter, without the fused attention module of evaluation, in which it sees nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
