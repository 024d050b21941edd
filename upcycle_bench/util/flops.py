"""FLOPs of matrix products, convolutions and attention, 2 per multiply-add, counted while they run.

    with counted_flops() as counter: ...
    counter.get_total_flops()

The formulas and the counts are those of PyTorch's FlopCounterMode (tested). That class also counts for each module, and
asks each operation at each call whether it is made of others. For a small model's evaluation it costs several times as
much as `FlopCounter`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

COUNTING_RULE = (
    "matrix multiplications, convolutions and attention at 2 FLOPs per multiply-add; training, also in preparation: at "
    "most seven evenly spaced steps are counted and extrapolated; batches of an evaluation set's images count as the "
    "first of their size did, scores of held-out pairs as the first; all else is counted whole; clustering and "
    "decompositions are not"
)


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of a `with` block, on any device, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self._formulas = flop_formulas()
        self._whole: set[Any] = set()  # operations that are not made of others
        self._total = 0

    def get_total_flops(self) -> int:
        """FLOPs so far. PyTorch's counter has a method of this name too."""
        return self._total

    def add(self, flops: int) -> None:
        """Add FLOPs that are known without counting."""
        self._total += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # an operator that takes functions, which has no FLOPs
            return NotImplemented
        if func not in self._whole:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._whole.add(func)
        out = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self._total += formula(*args, **kwargs, out_val=out)
        return out


def counting() -> bool:
    """Whether FLOPs are counted now. Padding that serves only speed must then be left out."""
    return any(isinstance(mode, FlopCounter) for mode in _get_current_dispatch_mode_stack())


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Stop the active counters, for many small operations without FLOPs, such as those that prepare an image.

    Counters within which another dispatch mode is active cannot be stopped, and go on. No generator may yield inside
    the block.
    """
    stopped = _innermost_counters()
    for counter in reversed(stopped):
        counter.__exit__(None, None, None)
    try:
        yield
    finally:
        for counter in stopped:
            counter.__enter__()


@contextlib.contextmanager
def counted_once(known: dict[Hashable, int], kind: Hashable) -> Iterator[None]:
    """Count the block's FLOPs only the first time that `kind` comes, for work whose FLOPs depend on its kind alone.

    Counting costs a tenth of the work. Afterwards the block runs `uncounted`, and each active counter adds the FLOPs in
    `known`. A block that raises adds nothing. Counters that cannot be stopped (`uncounted`) count each time.
    """
    counters = _innermost_counters()
    if not counters:
        yield
        return
    with uncounted(), contextlib.nullcontext() if kind in known else FlopCounter() as own:
        yield
    if own is not None:
        known[kind] = own.get_total_flops()
    for counter in counters:
        counter.add(known[kind])


def _innermost_counters() -> list[FlopCounter]:
    """The active counters, the innermost last; none where another dispatch mode is active within one of them."""
    stack = _get_current_dispatch_mode_stack()
    counters = [mode for mode in stack if isinstance(mode, FlopCounter)]
    return counters if stack[len(stack) - len(counters) :] == counters else []


@functools.cache
def flop_formulas() -> dict[Any, Callable[..., int]]:
    """PyTorch's formulas by operation, and two that it lacks: the CPU's attention kernel, and grouped products.

    The parts of a grouped product together make one whole product, whichever operand is cut into groups.
    """
    from torch.utils.flop_counter import (  # imports Triton, which most commands do without
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
    """A counter. Meanwhile PyTorch's fused attention module of evaluation is off, since no counter sees into it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
