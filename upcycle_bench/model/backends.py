"""The backends that run experts on their rows: three ways to the same numbers, chosen by device and precision.

    loop         each expert on its own block of rows: any device, precision and expert; the default on a CPU
    grouped_mm   one grouped product for all W1 and one for all W2: the default on CUDA from Hopper on, in bf16
    deepspeed    DeepSpeed's own layer, rows padded to the capacity: the reference, and expert parallelism

UPCYCLE_BENCH_EXPERTS=NAME forces one; records name it. Where `grouped_mm` cannot take some experts (DeRS, a plugin's,
widths that do not align), `loop` runs them and one warning says why.

Limits of torch.nn.functional.grouped_mm, from its documentation and trials on a CPU (torch 2.14): operands of one
dtype, float32 or of 16 bits; strides of whole 16 bytes; int32 offsets; no bias; no autocast. Below Hopper and in
float32 it is itself a loop over groups (pytorch#161407). Its kernel once hung in the backward pass where a group had
no rows (pytorch#152668), so experts without rows are left out.

Shape suffixes: R rows in blocks by expert, filler rows included; I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench.model.ffn import alike
from upcycle_bench.model.precision import compute_dtype
from upcycle_bench.util import environment
from upcycle_bench.util.errors import unknown
from upcycle_bench.util.flops import counting
from upcycle_bench.util.plain import plain

VARIABLE = "UPCYCLE_BENCH_EXPERTS"
HOPPER = (9, 0)  # the first compute capability with a kernel of its own
ALIGNMENT = 16  # bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Backend = Callable[[Sequence[Any], Tensor, Sequence[int]], Tensor]


def loop(experts: Sequence[Any], rows_RD: Tensor, block_sizes: Sequence[int]) -> Tensor:
    """Each expert on its block of rows, [R, D] -> [R, D]; expert i has `block_sizes[i]` rows."""
    return torch.cat([expert(rows) for expert, rows in zip(experts, rows_RD.split(block_sizes), strict=True)])


def grouped_mm(experts: Sequence[Any], rows_RD: Tensor, block_sizes: Sequence[int]) -> Tensor:
    """The same for plain FFNs, all experts at once; `refusal` says which it cannot take."""
    dtype = compute_dtype(rows_RD)
    busy = [number for number, size in enumerate(block_sizes) if size]
    ends = torch.tensor(block_sizes)[busy].cumsum(0).to(rows_RD.device, torch.int32)

    def linear(x_RI: Tensor, layers: Sequence[Any]) -> Tensor:
        weight_EOI = torch.stack([layer.weight.to(dtype) for layer in layers])  # all, so that each gets a gradient
        if len(busy) < len(layers):
            weight_EOI = weight_EOI[busy]
        y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends)
        biases = [layer.bias.to(dtype).expand(size, -1) for layer, size in zip(layers, block_sizes, strict=True)]
        return y_RO.add_(torch.cat(biases))

    hidden_RH = linear(rows_RD.to(dtype), [expert.c_fc for expert in experts])
    return linear(experts[0].gelu(hidden_RH), [expert.c_proj for expert in experts])


# DeepSpeed's backend is a whole layer: `dispatch.RaggedMOELayer` calls it, and `dispatch.Compute` the others.
BACKENDS: dict[str, Backend | None] = {"loop": loop, "grouped_mm": grouped_mm, "deepspeed": None}


def forced() -> str | None:
    """The backend that UPCYCLE_BENCH_EXPERTS names, or None where it is not set; UserError for an unknown name."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in BACKENDS:
        raise unknown(f"{VARIABLE}:", name, BACKENDS, "Or unset it.")
    return name


@contextlib.contextmanager
def forcing(name: str) -> Iterator[None]:
    """Force that backend in the block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def default(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The backend for that device and precision where nothing is forced."""
    fast = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")  # since torch 2.10
        and torch.cuda.get_device_capability(device) >= HOPPER
    )
    return "grouped_mm" if fast else "loop"


def row_multiple(x: Tensor, mean: int) -> int:
    """The number of which every block size should be a multiple, where experts have `mean` rows on average.

    In bf16 on a CPU, PyTorch compiles a kernel for every shape of a matrix product that it has not met lately. With
    row counts that change at every step, a small layer spends as long on that as on the products. A power of two up to
    1/32 of the mean leaves few shapes and adds 1/64 of rows. Filler rows have gradients of zeros, and zeros at the end
    of a sum do not change it. The number is 1 while FLOPs are counted.
    """
    if x.device.type != "cpu" or compute_dtype(x) != torch.bfloat16 or counting() or mean < 32 or plain():
        return 1
    return 1 << ((mean // 32).bit_length() - 1)


def refusal(experts: Sequence[Any], rows_RD: Tensor) -> str | None:
    """Why `grouped_mm` cannot compute these experts on these rows; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if len(rows_RD) == 0:
        return "no row is routed"
    first = experts[0]
    if not alike(experts):
        return "the experts are not plain FFNs with one activation"
    shapes = {(expert.c_fc.weight.shape, expert.c_proj.weight.shape) for expert in experts}
    if len(shapes) > 1:
        return "the experts differ in size"
    dtype = compute_dtype(rows_RD)
    if dtype not in DTYPES:
        return f"it does not compute in {dtype}"
    if any(size * dtype.itemsize % ALIGNMENT for size in first.c_fc.weight.shape):
        hidden, width = first.c_fc.weight.shape
        return f"a width of {width} or {hidden} in {dtype} is no multiple of {ALIGNMENT} bytes"
    return None


@functools.cache
def say_once(reason: str) -> None:
    """Warn that `loop` ran instead of `grouped_mm`, once for each reason."""
    warnings.warn(f"experts are computed one by one, not by grouped_mm: {reason}", stacklevel=2)


def machine(device: torch.device) -> dict[str, Any]:
    """The environment of this process, the backend that computes experts in bf16, and whether fast paths are off."""
    fast = {"plain": True} if plain() else {}
    return environment.capture(device.type) | {"experts": forced() or default(device), **fast}
