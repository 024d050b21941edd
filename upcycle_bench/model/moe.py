"""The MoE layer that replaces an FFN: text padding, experts and DeepSpeed's layer (`ragged`) behind one `forward`.

DeepSpeed is imported when the first layer is made, so that what only names layers (`upcycle-bench list`) is quick.

Shape suffixes: T tokens of the local micro-batch, padding left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from upcycle_bench import protocol
from upcycle_bench.model.ffn import Layer
from upcycle_bench.model.padding import Padding

if TYPE_CHECKING:
    from upcycle_bench.model.gate import Gate


from upcycle_bench.model.ffn import merged

EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"  # where DeepSpeed keeps them, in an `MoEFFN`


class MoEFFN(nn.Module):
    """What replaces a block's `mlp`: [B, L, D] -> [B, L, D], text padding left out before the gate.

    Tokens [T, D] without padding (`upcycle_bench.model.padding`) stay as they are.

    `self.moe` is DeepSpeed's MoE; its input [T, D] and its output (y [T, D], l_aux, counts) are what forward hooks see.
    With ep_size > 1 this rank keeps the experts ep_rank * N/ep_size onwards.
    """

    def __init__(
        self,
        layer: Layer,
        experts: Sequence[nn.Module],
        router_ED: Tensor,
        moe: protocol.MoE,
        padding: Padding | None,
    ) -> None:
        from upcycle_bench.model.deepspeed_import import MoE
        from upcycle_bench.model.dispatch import RaggedMOELayer
        from upcycle_bench.model.gate import Gate

        super().__init__()
        self.place, self.settings = layer, moe
        self.padding = padding
        self.l_aux: Tensor | None = None
        width = router_ED.shape[1]
        self.moe = MoE(width, nn.Identity(), moe.experts, moe.ep_size, moe.top_k)
        holder = self.moe.deepspeed_moe.experts
        rank = dist.get_rank() % moe.ep_size if moe.ep_size > 1 else 0
        local = len(experts) // moe.ep_size
        holder.deepspeed_experts = nn.ModuleList(experts[rank * local : (rank + 1) * local])
        self._mark(holder)
        gate = Gate(width, moe)
        gate.wg.weight = nn.Parameter(router_ED.detach().clone())
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
    def router_weight(self) -> nn.Parameter:
        """The router's rows, [E, D]."""
        return self.gate.wg.weight

    @property
    def compute(self) -> nn.Module:
        """What runs the experts on their rows, for hooks: (experts, rows_RD, layout) -> [R, D]."""
        return self.moe.deepspeed_moe.compute

    @property
    def expert_group(self) -> Any:
        """The process group over which the experts are spread."""
        return self.moe.deepspeed_moe.ep_group

    def take_dropped(self) -> tuple[int, int]:
        """(choices dropped, choices routed) in training since the last call."""
        return self.gate.take_dropped()

    @staticmethod
    def state_key(expert: int | str, part: str) -> str:
        """Key of an expert's tensor in this layer's state dict; `part` is `c_fc.weight` or the like."""
        return f"{EXPERTS}.{expert}.{part}"

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


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The upcycled layers by name (`vision.1`), in model order; empty for a dense model."""
    return {module.place.name: module for module in model.modules() if isinstance(module, MoEFFN)}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(total, active per token) parameters, experts of other ranks included; active: k of N in every MoE layer.

    What all experts of a layer share counts once in both.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        shared = set.intersection(*(set(expert.parameters()) for expert in layer.experts))
        own = sum(p.numel() for p in layer.experts.parameters() if p not in shared) * layer.moe.ep_size
        total += own - own // layer.moe.ep_size
        idle += own * (layer.place.num_experts - layer.place.top_k) // layer.place.num_experts
    return total, total - idle
