"""Backends of the experts' compute, chosen by device; tests hold their outputs and gradients together.

    loop         each expert on its own slice of the rows: any device, precision and expert; what a CPU takes
    grouped_mm   one grouped product for all experts' W1 and one for all W2: what CUDA takes for bf16, from Hopper on
    deepspeed    DeepSpeed's own layer, every expert padded to its capacity: the reference, and expert parallelism

UPCYCLE_BENCH_EXPERTS=NAME forces one, for measurements and comparisons; records say which it was. Experts that
`grouped_mm` does not know (DeRS, a plugin's) or cannot align are looped over, and that is said once.

torch.nn.functional.grouped_mm, as documented and as tried on a CPU (torch 2.14): operands of one dtype, float32 or of
16 bits; strides of whole 16 bytes; int32 offsets; no bias; autocast does not see it. Below Hopper and in float32 it is
itself a loop over groups (pytorch#161407). Its kernel once hung in the backward pass where a group had no rows
(pytorch#152668), so experts without rows are left out.

Shape suffixes: R routed rows, sorted by expert; D width, H hidden width, N experts.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.model.expert_ffns import compute_dtype, expert_ffns, parameters_of
from upcycle_bench.model.ffn import alike
from upcycle_bench.util.errors import unknown
from upcycle_bench.util.flops import counting

VARIABLE = "UPCYCLE_BENCH_EXPERTS"
HOPPER = (9, 0)  # the first compute capability with a kernel of its own
ALIGNMENT = 16  # bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Backend = Callable[[Sequence[Any], Tensor, Sequence[int]], Tensor]


def loop(experts: Sequence[Any], rows_RD: Tensor, rooms: Sequence[int]) -> Tensor:
    """Each expert on its `rooms[i]` rows (those that pad included), [R, D] -> [R, D]."""
    if as_one(experts, rows_RD):
        return expert_ffns(rows_RD, rooms, experts)
    return torch.cat([expert(rows) for expert, rows in zip(experts, rows_RD.split(rooms), strict=True)])


def multiple(rows: Tensor, mean: int) -> int:
    """What number of rows an expert's are padded to a multiple of, where it has `mean` of them on average.

    In bf16 on a CPU, PyTorch's products compile a kernel for each shape that they have not met lately, which for the
    ever new row counts of a small layer takes as long as the product. A power of two up to 1/32 of the mean leaves few
    shapes and adds 1/64 of rows. Zeros at the end of a sum do not change it. FLOPs are counted without.
    """
    if rows.device.type != "cpu" or compute_dtype(rows) != torch.bfloat16 or counting() or mean < 32:
        return 1
    return 1 << ((mean // 32).bit_length() - 1)


def grouped_mm(experts: Sequence[Any], rows_RD: Tensor, counts: Sequence[int]) -> Tensor:
    """The same for plain FFNs, all experts at once; see `refusal` for what it cannot take."""
    dtype = compute_dtype(rows_RD)
    busy = [number for number, count in enumerate(counts) if count]
    ends = torch.tensor(counts)[busy].cumsum(0).to(rows_RD.device, torch.int32)

    def linear(x_RK: Tensor, layers: Sequence[Any]) -> Tensor:
        weight_NMK = torch.stack([layer.weight.to(dtype) for layer in layers])  # all: the idle get a gradient of zeros
        if len(busy) < len(layers):
            weight_NMK = weight_NMK[busy]
        y_RM = F.grouped_mm(x_RK, weight_NMK.transpose(1, 2), offs=ends)
        biases = [layer.bias.to(dtype).expand(count, -1) for layer, count in zip(layers, counts, strict=True)]
        return y_RM.add_(torch.cat(biases))

    hidden_RH = linear(rows_RD.to(dtype), [expert.c_fc for expert in experts])
    return linear(experts[0].gelu(hidden_RH), [expert.c_proj for expert in experts])


# DeepSpeed's backend is a whole layer (gate, slots, all-to-all), so `ragged.RaggedMOELayer` calls it, not `Compute`.
BACKENDS: dict[str, Backend | None] = {"loop": loop, "grouped_mm": grouped_mm, "deepspeed": None}


def forced() -> str | None:
    """The backend that UPCYCLE_BENCH_EXPERTS names, if it is set; UserError for one that there is not."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in BACKENDS:
        raise unknown(f"{VARIABLE}:", name, BACKENDS, "Or unset it.")
    return name


def default(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The backend for that device and precision where nothing is forced."""
    fast = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")  # since torch 2.10
        and torch.cuda.get_device_capability(device) >= HOPPER
    )
    return "grouped_mm" if fast else "loop"


def rows_dtype(experts: Sequence[Any], x: Tensor) -> torch.dtype:
    """What rows are best gathered in: that of the experts' products, if these are all that is done with them."""
    return compute_dtype(x) if as_one(experts, x) else x.dtype


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


def as_one(experts: Sequence[Any], x: Tensor) -> bool:
    """Whether `expert_ffns` computes them: alike, no weight used twice, an activation that it can compute again.

    Under autocast, where it spares casts: in one precision it is no faster, and at small widths 5 % slower.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return False
    from open_clip.transformer import QuickGELU  # not for who only asks which backend there is

    act = getattr(experts[0], "gelu", None)
    if type(act) not in (nn.GELU, nn.ReLU, nn.SiLU, QuickGELU) or getattr(act, "inplace", False):
        return False
    return alike(experts) and len({*map(id, parameters_of(experts))}) == 4 * len(experts)


@functools.cache
def say_once(reason: str) -> None:
    """Warn that `grouped_mm` was not taken, once for each reason."""
    warnings.warn(f"experts are computed one by one, not by grouped_mm: {reason}", stacklevel=2)
