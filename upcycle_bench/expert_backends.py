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
from torch.autograd.function import once_differentiable

from upcycle_bench.errors import unknown
from upcycle_bench.flops import counting
from upcycle_bench.rows import Layout

VARIABLE = "UPCYCLE_BENCH_EXPERTS"
HOPPER = (9, 0)  # the first compute capability with a kernel of its own
ALIGNMENT = 16  # bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Backend = Callable[[Sequence[Any], Tensor, Sequence[int]], Tensor]


class _GroupedLinear(torch.autograd.Function):
    """y_i = x_i W_i^T + b_i, a product for each expert, straight from one buffer of all experts' rows into another.

    What autocast and autograd do for `nn.Linear`, to the bit where each layer runs once, without their bookkeeping for
    each of many small layers.
    """

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, rooms: Sequence[int], dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        ctx.rooms, ctx.given = rooms, [x_RK.dtype, *(parameter.dtype for parameter in parameters)]
        x_RK, *cast = (tensor.to(dtype) for tensor in (x_RK, *parameters))
        weights, biases = cast[: len(rooms)], cast[len(rooms) :]
        x_wanted, _, _, *wanted = ctx.needs_input_grad
        ctx.save_for_backward(x_RK if any(wanted) else None, *(weights if x_wanted else ()))
        y_RM = x_RK.new_empty(len(x_RK), len(biases[0]))
        for x, weight_MK, bias_M, y in zip(x_RK.split(rooms), weights, biases, y_RM.split(rooms), strict=True):
            torch.addmm(bias_M, x, weight_MK.t(), out=y)
        return y_RM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RM: Tensor) -> tuple[Any, ...]:
        x_RK, *weights = ctx.saved_tensors
        x_dtype, *dtypes = ctx.given
        x_wanted, _, _, *wanted = ctx.needs_input_grad
        grads = grad_RM.split(ctx.rooms)
        grad_RK = None
        if x_wanted:
            grad_RK = grad_RM.new_empty(len(grad_RM), weights[0].shape[1])
            for grad, weight_MK, out in zip(grads, weights, grad_RK.split(ctx.rooms), strict=True):
                torch.mm(grad, weight_MK, out=out)
            grad_RK = grad_RK.to(x_dtype)
        x = x_RK.split(ctx.rooms) if x_RK is not None else ()
        of_parameters: list[Tensor | None] = []
        for number, (want, dtype) in enumerate(zip(wanted, dtypes, strict=True)):
            bias, expert = divmod(number, len(grads))
            made = None if not want else grads[expert].sum(0) if bias else grads[expert].t() @ x[expert]
            of_parameters.append(None if made is None else made.to(dtype))
        return grad_RK, None, None, *of_parameters


def loop(experts: Sequence[Any], rows_RD: Tensor, rooms: Sequence[int]) -> Tensor:
    """Each expert on its `rooms[i]` rows, [R, D] -> [R, D]."""
    if _differ(experts):
        return torch.cat([expert(rows) for expert, rows in zip(experts, rows_RD.split(rooms), strict=True)])
    dtype = compute_dtype(rows_RD)

    def linear(x_RK: Tensor, layers: Sequence[Any]) -> Tensor:
        parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        return _GroupedLinear.apply(x_RK, rooms, dtype, *parameters)

    hidden_RH = linear(rows_RD, [expert.c_fc for expert in experts])
    return linear(experts[0].gelu(hidden_RH), [expert.c_proj for expert in experts])


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


# DeepSpeed's backend is a whole layer (gate, slots, all-to-all), so `moe.RaggedMOELayer` calls it, not `Compute`.
BACKENDS: dict[str, Backend | None] = {"loop": loop, "grouped_mm": grouped_mm, "deepspeed": None}


class Compute(nn.Module):
    """The rows of all experts by the right backend; a module, so that a hook sees them, without parameters."""

    def forward(self, experts: Sequence[Any], rows_RD: Tensor, layout: Layout) -> Tensor:
        """Rows [R, D] that stand as `layout` says -> their experts' outputs, [R, D]."""
        name = forced() or default(rows_RD.device, compute_dtype(rows_RD))
        if name == "grouped_mm":
            reason = refusal(experts, rows_RD)
            if reason is None:
                return grouped_mm(experts, rows_RD, layout.rooms)
            _say_once(reason)
        return loop(experts, rows_RD, layout.rooms)


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


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with `x` is computed in: autocast's dtype where it is on."""
    kind = x.device.type
    if x.dtype == torch.float64:  # which autocast leaves alone
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def refusal(experts: Sequence[Any], rows_RD: Tensor) -> str | None:
    """Why `grouped_mm` cannot compute these experts on these rows; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if len(rows_RD) == 0:
        return "no row is routed"
    if (reason := _differ(experts)) is not None:
        return reason
    first = experts[0]
    dtype = compute_dtype(rows_RD)
    if dtype not in DTYPES:
        return f"it does not compute in {dtype}"
    if any(size * dtype.itemsize % ALIGNMENT for size in first.c_fc.weight.shape):
        hidden, width = first.c_fc.weight.shape
        return f"a width of {width} or {hidden} in {dtype} is no multiple of {ALIGNMENT} bytes"
    return None


def _differ(experts: Sequence[Any]) -> str | None:
    """Why these experts are not plain FFNs of one shape; None if they are."""
    first = experts[0]
    if not all(_plain(expert) and _act(expert) == _act(first) for expert in experts):
        return "the experts are not plain FFNs with one activation"
    shapes = {(expert.c_fc.weight.shape, expert.c_proj.weight.shape) for expert in experts}
    return "the experts differ in size" if len(shapes) > 1 else None


def _plain(expert: Any) -> bool:
    """What `FFN.expert` makes, and no hook that wants to see it run."""
    parts = dict(expert.named_children()) if type(expert) is nn.Sequential else {}
    linear = all(type(parts.get(name)) is nn.Linear and parts[name].bias is not None for name in ("c_fc", "c_proj"))
    hooked = any(_hooked(part) for part in expert.modules())
    return list(parts) == ["c_fc", "gelu", "c_proj"] and linear and not hooked and not list(parts["gelu"].parameters())


def _hooked(part: Any) -> bool:
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or "forward" in vars(part)


def _act(expert: Any) -> tuple[type, dict[str, Any]]:
    state = {name: value for name, value in vars(expert.gelu).items() if not name.startswith("_")}
    return type(expert.gelu), state


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"experts are computed one by one, not by grouped_mm: {reason}", stacklevel=2)
