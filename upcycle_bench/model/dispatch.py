"""From routes to outputs: rows sorted by expert, computed by a backend, and combined for each token.

DeepSpeed pads every expert to its capacity: at capacity factor 2 it computes twice the rows that were routed. With
`ep_size` 1 we sort the routed rows by expert and compute just these (`backends`); under expert parallelism we use
DeepSpeed's forward. Outputs and gradients agree with DeepSpeed's to rounding.
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
from upcycle_bench.model.expert_ffns import compute_dtype
from upcycle_bench.model.token_rows import combine_rows, select_rows


@dataclass(frozen=True)
class Layout:
    """Where routed rows stand: sorted by expert, then by choice and token; behind each expert's rows what pads them.

    With K choices for each of T tokens, choice c = k * T + t is the k-th of token t.
    """

    choice_R: Tensor  # the choice that a row holds; K * T: a row that pads
    slots_KT: Tensor  # the row of a choice; R: dropped
    counts: list[int]  # rows by expert
    rooms: list[int]  # rows by expert with those that pad
    drops: bool

    def by_expert(self, rows_RD: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, without those that pad."""
        rooms = rows_RD.split(self.rooms)
        return tuple(room[:count] for room, count in zip(rooms, self.counts, strict=True))

    @property
    def token_R(self) -> Tensor:
        """The token that a row is; a row that pads is token 0, of which nothing is used."""
        return self.choice_R % self.slots_KT.shape[1]


def lay_out(index_KT: Tensor, experts: int, multiple: int = 1) -> Layout:
    """The layout of the choices index_KT (-1: dropped), each expert's rows padded to a multiple."""
    choices = index_KT.numel()
    index_C = index_KT.flatten().long()
    # One row an expert, and one for what was dropped: contiguous sums, in 32 bits.
    chosen_MC = (torch.arange(-1, experts, device=index_C.device)[:, None] == index_C).int()
    place_C = chosen_MC.cumsum(1, dtype=torch.int32).gather(0, index_C[None] + 1)[0] - 1
    dropped, *counts = chosen_MC.sum(1).tolist()
    rooms = [-(-count // multiple) * multiple for count in counts]
    ends_N = list(itertools.accumulate(rooms))
    start_N = torch.tensor([0, *ends_N[:-1]], device=index_C.device)
    slots_C = torch.where(index_C < 0, ends_N[-1], start_N[index_C] + place_C)
    choice_R = torch.full((ends_N[-1] + 1,), choices, device=index_C.device)  # one more takes what was dropped
    choice_R.index_copy_(0, slots_C, torch.arange(choices, device=index_C.device))
    return Layout(choice_R[:-1], slots_C.view(index_KT.shape), counts, rooms, dropped > 0)


class Compute(nn.Module):
    """The rows of all experts by the right backend; a module, so that a hook sees them, without parameters."""

    def forward(self, experts: Sequence[Any], rows_RD: Tensor, layout: Layout) -> Tensor:
        """Rows [R, D] that stand as `layout` says -> their experts' outputs, [R, D]."""
        name = backends.forced() or backends.default(rows_RD.device, compute_dtype(rows_RD))
        if name == "grouped_mm":
            reason = backends.refusal(experts, rows_RD)
            if reason is None:
                return backends.grouped_mm(experts, rows_RD, layout.rooms)
            backends.say_once(reason)
        return backends.loop(experts, rows_RD, layout.rooms)


class RaggedMOELayer(MOELayer):
    """DeepSpeed's MOELayer with each expert run on exactly the rows routed to it (one rank per expert group)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.compute = Compute()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[T, D] -> [T, D]; sets `l_aux` and `exp_counts` as the parent does."""
        if self.ep_size > 1 or backends.forced() == "deepspeed":
            return super().forward(*args, **kwargs)
        x_TD = args[0]
        self.l_aux, _, num_experts, index_KT, _, gates_KT, self.exp_counts = self.gate(x_TD, None, True, False)
        multiple = backends.multiple(x_TD, index_KT.numel() // num_experts)
        layout = lay_out(index_KT, num_experts, multiple)
        experts = self.experts.deepspeed_experts
        dtype = backends.rows_dtype(experts, x_TD)
        rows_RD = select_rows(x_TD, layout.token_R, layout.slots_KT, inverse_holes=layout.drops, dtype=dtype)
        out_RD = self.compute(experts, rows_RD, layout)
        return combine_rows(out_RD, gates_KT, layout.slots_KT, layout.choice_R, holes=layout.drops)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last loss, which carries a graph, and as the gate's: a model can be copied while it trains."""
        return self.__dict__ | {"l_aux": None, "ep_group": None}
