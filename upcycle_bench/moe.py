"""The MoE layer that replaces an FFN: text padding, experts and DeepSpeed's layer (`ragged`) behind one `forward`.

DeepSpeed is imported when the first layer is made, so that what only names layers (`upcycle-bench list`) is quick.

Shape suffixes: B batch, L sequence, T tokens (of the local micro-batch, padding left out), D width, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from upcycle_bench import protocol
from upcycle_bench.padding import Padding
from upcycle_bench.strategy import Layer

if TYPE_CHECKING:
    from upcycle_bench.ragged import Gate


class MoEFFN(nn.Module):
    """What replaces a block's `mlp`: [B, L, D] -> [B, L, D], text padding left out before the gate.

    Tokens [T, D] without padding (`upcycle_bench.packed`) stay as they are.

    `self.moe` is DeepSpeed's MoE; its input [T, D] and its output (y [T, D], l_aux, counts) are what forward hooks see.
    With ep_size > 1 this rank keeps the experts ep_rank * N/ep_size onwards.
    """

    def __init__(
        self,
        layer: Layer,
        experts: Sequence[nn.Module],
        router_ND: Tensor,
        moe: protocol.MoE,
        padding: Padding | None,
    ) -> None:
        from upcycle_bench.ds import MoE
        from upcycle_bench.ragged import Gate, RaggedMOELayer

        super().__init__()
        self.layer, self.settings = layer, moe
        self.padding = padding
        self.l_aux: Tensor | None = None
        width = router_ND.shape[1]
        self.moe = MoE(width, nn.Identity(), moe.experts, moe.ep_size, moe.top_k)
        holder = self.moe.deepspeed_moe.experts
        rank = dist.get_rank() % moe.ep_size if moe.ep_size > 1 else 0
        local = len(experts) // moe.ep_size
        holder.deepspeed_experts = nn.ModuleList(experts[rank * local : (rank + 1) * local])
        self._mark(holder)
        gate = Gate(width, moe)
        gate.wg.weight = nn.Parameter(router_ND.detach().clone())
        self.moe.deepspeed_moe = RaggedMOELayer(
            gate, holder, self.moe.expert_group_name, moe.ep_size, self.moe.num_local_experts
        )

    def _mark(self, experts: nn.Module) -> None:
        parameter: Any
        for parameter in experts.parameters():  # as deepspeed.moe.experts.Experts marks its copies
            parameter.allreduce = False
            parameter.group_name = self.moe.expert_group_name

    def merge(self) -> None:
        """Put the plain FFN in the place of each expert that has a `merged` form."""
        for number, expert in enumerate(self.experts):
            plain = merged(expert)
            if plain is not expert:
                self._mark(plain)
                self.experts[number] = plain.train(expert.training)

    def __getstate__(self) -> dict[str, Any]:
        """As `RaggedMOELayer`'s."""
        return self.__dict__ | {"l_aux": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's parameters are new ones, without DeepSpeed's marks."""
        super().__setstate__(state)
        self._mark(self.moe.deepspeed_moe.experts)

    @property
    def gate(self) -> Gate:
        """The router."""
        return self.moe.deepspeed_moe.gate

    @property
    def experts(self) -> nn.ModuleList:
        """This rank's experts."""
        return self.moe.deepspeed_moe.experts.deepspeed_experts

    @property
    def c_fc(self) -> nn.Module:
        """open_clip asks block 0 for `mlp.c_fc.weight.dtype`; the router answers for us."""
        return self.gate.wg

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, -2)
        padding = self.padding if x_BLD.dim() == 3 else None
        if padding is not None:
            x_TD = padding.compact(x_TD)
        y_TD, self.l_aux, _ = self.moe(x_TD)
        if padding is not None:
            y_TD = padding.expand(y_TD)
        return y_TD.view(x_BLD.shape)


def merged(expert: Any) -> nn.Module:
    """The plain FFN that computes what `expert` does: itself, or what its `merged` makes."""
    return expert.merged() if hasattr(expert, "merged") else expert


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The upcycled layers by name (`vision.1`), in model order; empty for a dense model."""
    return {module.layer.name: module for module in model.modules() if isinstance(module, MoEFFN)}
