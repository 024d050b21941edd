"""The dense FFN, its place in the network, and what a strategy makes of it: experts and a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    pass


import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F

if TYPE_CHECKING:
    pass


def merged(expert: Any) -> nn.Module:
    """The plain FFN that computes what `expert` does: itself, or what its `merged` makes."""
    return expert.merged() if hasattr(expert, "merged") else expert


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def alike(experts: Sequence[Any]) -> bool:
    """Whether all are plain FFNs with the same activation, which can then be computed for all rows at once."""
    return all(plain(expert) and _act(expert) == _act(experts[0]) for expert in experts)


def plain(expert: Any) -> bool:
    """What `FFN.expert` makes, and no hook that wants to see it run."""
    if type(expert) is not nn.Sequential or list(expert._modules) != ["c_fc", "gelu", "c_proj"]:
        return False
    c_fc, act, c_proj = parts = expert._modules.values()
    linear = all(type(part) is nn.Linear and part._parameters["bias"] is not None for part in (c_fc, c_proj))
    return linear and not act._parameters and not act._modules and not any(map(_hooked, (expert, *parts)))


def _hooked(part: Any) -> bool:
    own = part.__dict__  # asked 30 times a layer and step: a module looks its attributes up slowly
    return "forward" in own or any(own[name] for name in _HOOKS)


def _act(expert: Any) -> tuple[type, dict[str, Any]]:
    act = expert._modules["gelu"]
    return type(act), {name: value for name, value in act.__dict__.items() if name[0] != "_"}


@dataclass(frozen=True)
class FFN:
    """One dense feed-forward block, FFN(x) = W2 act(W1 x + b1) + b2; tensors are the dense model's own, read-only."""

    w1_HD: Tensor
    b1_H: Tensor
    w2_DH: Tensor
    b2_D: Tensor
    act: nn.Module

    @classmethod
    def of(cls, mlp: Any) -> FFN:
        """Read open_clip's `mlp` (c_fc, gelu, c_proj)."""
        return cls(
            mlp.c_fc.weight.detach(),
            mlp.c_fc.bias.detach(),
            mlp.c_proj.weight.detach(),
            mlp.c_proj.bias.detach(),
            mlp.gelu,
        )

    @property
    def width(self) -> int:
        """D."""
        return self.w1_HD.shape[1]

    @property
    def hidden(self) -> int:
        """H."""
        return self.w1_HD.shape[0]

    def resized(self, hidden: int) -> FFN:
        """Its first `hidden` neurons, or, where it has fewer, neurons of zeros behind its own: the same function."""
        if hidden == self.hidden:
            return self
        more = max(0, hidden - self.hidden)
        return FFN(
            F.pad(self.w1_HD, (0, 0, 0, more))[:hidden],
            F.pad(self.b1_H, (0, more))[:hidden],
            F.pad(self.w2_DH, (0, more))[:, :hidden],
            self.b2_D,
            self.act,
        )

    def put_into(self, mlp: Any) -> None:
        """Give open_clip's `mlp` copies of these tensors, whatever its hidden width was."""
        made: Any = self.expert()
        mlp.c_fc, mlp.c_proj = made.c_fc, made.c_proj

    def expert(
        self,
        *,
        w1_HD: Tensor | None = None,
        b1_H: Tensor | None = None,
        w2_DH: Tensor | None = None,
        b2_D: Tensor | None = None,
    ) -> nn.Sequential:
        """A trainable copy of this FFN with storage of its own; given tensors replace the dense ones."""
        parts = [
            own if given is None else given
            for own, given in ((self.w1_HD, w1_HD), (self.b1_H, b1_H), (self.w2_DH, w2_DH), (self.b2_D, b2_D))
        ]
        w1, b1, w2, b2 = (nn.Parameter(part.detach().to(self.w1_HD, copy=True)) for part in parts)
        c_fc, c_proj = (nn.Linear(w.shape[1], w.shape[0], device="meta") for w in (w1, w2))
        c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias = w1, b1, w2, b2
        return nn.Sequential(OrderedDict(c_fc=c_fc, gelu=copy.deepcopy(self.act), c_proj=c_proj))


@dataclass(frozen=True)
class Layer:
    """Where an MoE layer stands and what the protocol wants of it; `depth` is the number of blocks of its tower."""

    tower: Literal["vision", "text"]
    block: int
    depth: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        """Short unique name, as in diagnostics: `vision.1`."""
        return f"{self.tower}.{self.block}"

    @property
    def mlp_path(self) -> str:
        """The module's path in an open_clip CLIP."""
        prefix = "visual." if self.tower == "vision" else ""
        return f"{prefix}transformer.resblocks.{self.block}.mlp"


@dataclass(frozen=True)
class LayerInit:
    """What a strategy makes of one FFN.

    experts: N modules [T, D] -> [T, D], global order; router_ND: rows are router directions, no bias;
    notes: numbers for the step-0 receipt (ranks kept, agreement rate, ...).

    An expert that is not what `FFN.expert` makes may have `merged() -> nn.Module`: the plain FFN that computes the same
    function, with storage of its own. Trained experts are merged before they are saved and scored.
    """

    experts: Sequence[nn.Module]
    router_ND: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)
