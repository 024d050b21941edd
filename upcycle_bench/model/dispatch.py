"""From routes to outputs: token rows sorted by expert, computed by a backend, and combined for each token.

DeepSpeed pads the rows of every expert to its capacity: at capacity factor 2 it computes twice the rows that were
routed. `RaggedMOELayer` computes the routed rows alone. Its outputs and gradients agree with DeepSpeed's to rounding.
Under expert parallelism it leaves the work to DeepSpeed.

The backends want each expert's rows in one block. A block may end in filler rows, of which nothing is used: they round
its size up (`backends.row_multiple`).

Shape suffixes: M = K * T choices, choice k * T + t being the k-th of token t; R rows, those that fill included.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model import backends
from upcycle_bench.model.deepspeed_import import MOELayer
from upcycle_bench.model.precision import compute_dtype


class RaggedMOELayer(MOELayer):
    """DeepSpeed's MOELayer that runs each expert on exactly the rows routed to it, where one rank has all experts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.compute = Compute()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[T, D] -> [T, D]; sets `l_aux` and `exp_counts` as the parent does."""
        if self.ep_size > 1 or backends.forced() == "deepspeed":
            return super().forward(*args, **kwargs)
        x_TD = args[0]
        self.l_aux, _, num_experts, index_KT, _, gates_KT, self.exp_counts = self.gate(x_TD)
        multiple = backends.row_multiple(x_TD, index_KT.numel() // num_experts)
        layout = lay_out(index_KT, num_experts, multiple)
        experts = self.experts.deepspeed_experts
        out_RD = self.compute(experts, gather_rows(x_TD, layout), layout)
        return combine_rows(out_RD, gates_KT, layout)  # Eq. 4

    def __getstate__(self) -> dict[str, Any]:
        """A copy in the midst of training has no process group, and no last loss, which holds a graph."""
        return self.__dict__ | {"l_aux": None, "ep_group": None}


class Compute(nn.Module):
    """Runs all experts on their rows by the right backend.

    It has no parameters; it is a module so that forward hooks can see the rows.
    """

    def forward(self, experts: Sequence[Any], rows_RD: Tensor, layout: Layout) -> Tensor:
        """Rows [R, D] in the order of `layout` -> their experts' outputs, [R, D]."""
        name = backends.forced() or backends.default(rows_RD.device, compute_dtype(rows_RD))
        if name == "grouped_mm":
            reason = backends.refusal(experts, rows_RD)
            if reason is None:
                return backends.grouped_mm(experts, rows_RD, layout.block_sizes)
            backends.say_once(reason)
        return backends.loop(experts, rows_RD, layout.block_sizes)


@dataclass(frozen=True)
class Layout:
    """The order of the rows: one block for each expert; in a block by choice and token, then the filler rows."""

    choice_R: Tensor  # the choice whose token a row holds; M: a filler row
    slots_KT: Tensor  # the row of each choice; R: the choice was dropped
    counts: list[int]  # routed rows of each expert
    block_sizes: list[int]  # the same with filler rows
    drops: bool  # whether a choice was dropped

    def by_expert(self, rows_RD: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, without filler rows."""
        blocks = rows_RD.split(self.block_sizes)
        return tuple(block[:count] for block, count in zip(blocks, self.counts, strict=True))


def lay_out(index_KT: Tensor, experts: int, multiple: int = 1) -> Layout:
    """The layout of choices by their experts `index_KT` (-1: dropped); block sizes are multiples of `multiple`."""
    choices = index_KT.numel()
    index_M = index_KT.flatten().long()
    # A row for the dropped choices, and one for each expert: the sums run over contiguous 32-bit numbers.
    chosen_XM = (torch.arange(-1, experts, device=index_M.device)[:, None] == index_M).int()  # [1 + E, M]
    place_M = chosen_XM.cumsum(1, dtype=torch.int32).gather(0, index_M[None] + 1)[0] - 1
    dropped, *counts = chosen_XM.sum(1).tolist()
    block_sizes = [-(-count // multiple) * multiple for count in counts]
    ends = list(itertools.accumulate(block_sizes))
    start_E = torch.tensor([0, *ends[:-1]], device=index_M.device)
    slots_M = torch.where(index_M < 0, ends[-1], start_E[index_M] + place_M)
    choice_R = torch.full((ends[-1] + 1,), choices, device=index_M.device)  # the last takes the dropped choices
    choice_R.index_copy_(0, slots_M, torch.arange(choices, device=index_M.device))
    return Layout(choice_R[:-1], slots_M.view(index_KT.shape), counts, block_sizes, dropped > 0)


def gather_rows(x_TD: Tensor, layout: Layout) -> Tensor:
    """The row of each choice's token, [T, D] -> [R, D]; a filler row copies the last token.

    A choice has one row at most. So no two gradients meet in one place before they are summed over the K choices, and
    the sum has a fixed order on every device.
    """
    choices_MD = x_TD.expand(len(layout.slots_KT), *x_TD.shape).flatten(0, 1)
    return choices_MD.index_select(0, layout.choice_R.clamp(max=len(choices_MD) - 1))


def combine_rows(rows_RD: Tensor, gates_KT: Tensor, layout: Layout) -> Tensor:
    """y_t = sum_k gates[k, t] * rows[slots[k, t]], [T, D], summed in the gates' precision; a dropped choice adds 0."""
    holed_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])]) if layout.drops else rows_RD
    parts = [
        holed_RD.index_select(0, slots_T).to(gates_T.dtype) * gates_T.unsqueeze(1)
        for slots_T, gates_T in zip(layout.slots_KT, gates_KT, strict=True)
    ]
    return sum(parts[1:], start=parts[0]).to(rows_RD.dtype)
