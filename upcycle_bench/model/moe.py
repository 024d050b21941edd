"""The MoE layer that replaces an FFN: DeepSpeed's layer with our experts and router, without text padding.

    layer = moe_layers(model)["vision.1"]
    layer.router_weight, layer.experts, layer.l_aux

No other file knows where DeepSpeed keeps things: they use the properties of `MoEFFN`.

DeepSpeed is imported when the first layer is made, so that commands which need none (`upcycle-bench list`) are quick.

Shape suffixes: T tokens of the local micro-batch, padding left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from upcycle_bench import protocol
from upcycle_bench.model.ffn import Layer, merged
from upcycle_bench.model.padding import Padding

if TYPE_CHECKING:
    from upcycle_bench.model.gate import Gate  # which imports DeepSpeed

EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"  # where DeepSpeed keeps them in an `MoEFFN`
EXPERT_KEY = re.compile(rf"(.*)\.{re.escape(EXPERTS)}\.(\d+)\.(.*)")  # the path of the `MoEFFN`, the expert, its part


class MoEFFN(nn.Module):
    """What replaces a block's `mlp`: [B, L, D] -> [B, L, D]; or tokens without padding, [T, D] -> [T, D].

    Text padding is left out before the gate, and gets an output of zeros.

    `self.moe` is DeepSpeed's MoE. Its forward hooks see its input [T, D] and its output: y [T, D], l_aux, counts [E].
    Under expert parallelism this rank keeps E / ep_size experts, from global number ep_rank * E / ep_size on.
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

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] or [T, D], the same out; sets `l_aux`, the load-balancing loss of these tokens."""
        x_TD = x_BLD.flatten(0, -2)
        padding = self.padding if x_BLD.dim() == 3 else None
        if padding is not None:
            x_TD = padding.compact(x_TD)
        y_TD, self.l_aux, _ = self.moe(x_TD)
        if padding is not None:
            y_TD = padding.expand(y_TD)
        return y_TD.view(x_BLD.shape)

    def merge(self) -> None:
        """Put the plain FFN in the place of each expert that has a `merged` form."""
        for number, expert in enumerate(self.experts):
            plain = merged(expert)
            if plain is not expert:
                self._mark(plain)
                self.experts[number] = plain.train(expert.training)

    @property
    def gate(self) -> Gate:
        """The router; its forward hooks see `gate.Routes`."""
        return self.moe.deepspeed_moe.gate

    @property
    def experts(self) -> nn.ModuleList:
        """The experts of this rank."""
        return self.moe.deepspeed_moe.experts.deepspeed_experts

    @property
    def router_weight(self) -> nn.Parameter:
        """The router's weight, [E, D]."""
        return self.gate.wg.weight

    @property
    def compute(self) -> nn.Module:
        """What runs the experts; its forward hooks see (experts, rows [R, D], `dispatch.Layout`) and the output [R, D].

        It does not run under expert parallelism nor with the backend `deepspeed`.
        """
        return self.moe.deepspeed_moe.compute

    @property
    def expert_group(self) -> Any:
        """The process group over which the experts are spread, once an engine has made it."""
        return self.moe.deepspeed_moe.ep_group

    def take_dropped(self) -> tuple[int, int]:
        """(choices dropped, choices routed) in training since the last call."""
        return self.gate.take_dropped()

    @staticmethod
    def state_key(expert: int | str, part: str) -> str:
        """The key of an expert's tensor in the state dict of an `MoEFFN`; `part` is `c_fc.weight` or the like."""
        return f"{EXPERTS}.{expert}.{part}"

    @property
    def c_fc(self) -> nn.Module:
        """For open_clip, which asks block 0 for `mlp.c_fc.weight.dtype`: the router has the layer's dtype."""
        return self.gate.wg

    def _mark(self, experts: nn.Module) -> None:
        """Mark the experts' parameters for DeepSpeed's engine, as `deepspeed.moe.experts.Experts` does."""
        parameter: Any
        for parameter in experts.parameters():
            parameter.allreduce = False
            parameter.group_name = self.moe.expert_group_name

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no last loss, which holds a graph."""
        return self.__dict__ | {"l_aux": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's parameters are new ones, without DeepSpeed's marks."""
        super().__setstate__(state)
        self._mark(self.moe.deepspeed_moe.experts)


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The MoE layers by name (`vision.1`), in the order of the model; empty for a dense model."""
    return {module.place.name: module for module in model.modules() if isinstance(module, MoEFFN)}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(total, active per token) parameters, experts of other ranks included; active are K of E experts in each layer.

    Parameters that all experts of a layer share count once in both.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        shared = set.intersection(*(set(expert.parameters()) for expert in layer.experts))
        own = sum(p.numel() for p in layer.experts.parameters() if p not in shared) * layer.moe.ep_size
        total += own - own // layer.moe.ep_size
        idle += own * (layer.place.num_experts - layer.place.top_k) // layer.place.num_experts
    return total, total - idle
