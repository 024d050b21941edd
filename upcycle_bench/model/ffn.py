"""The dense FFN, where it stands in the network, and what a strategy makes of it: experts and a router.

ffn = FFN.of(model.get_submodule(layer.mlp_path))                               # the dense weights, read-only
init = LayerInit([ffn.expert() for _ in range(layer.num_experts)], router_ED)   # sparse upcycling: copies
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class FFN:
    """One dense feed-forward block, FFN(x) = W2 act(W1 x + b1) + b2.

    The tensors are the dense model's own: read them, do not write to them.
    """

    w1_HD: Tensor
    b1_H: Tensor
    w2_DH: Tensor
    b2_D: Tensor
    act: nn.Module

    @classmethod
    def of(cls, mlp: Any) -> FFN:
        """The FFN of open_clip's `mlp` (c_fc, gelu, c_proj)."""
        return cls(
            mlp.c_fc.weight.detach(),
            mlp.c_fc.bias.detach(),
            mlp.c_proj.weight.detach(),
            mlp.c_proj.bias.detach(),
            mlp.gelu,
        )

    @property
    def width(self) -> int:
        """D, the width of the block's input and output."""
        return self.w1_HD.shape[1]

    @property
    def hidden(self) -> int:
        """H, the hidden width."""
        return self.w1_HD.shape[0]

    def resized(self, hidden: int) -> FFN:
        """The FFN with `hidden` hidden neurons: the first ones, or all and then neurons of zeros.

        Neurons of zeros do not change the function.
        """
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
        """Give open_clip's `mlp` copies of these tensors; its hidden width may change."""
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
        """A trainable copy of this FFN with storage of its own.

        Tensors that are given replace the dense ones; they are copied to the FFN's dtype and device.
        """
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
    """Where an MoE layer stands, and its size by the protocol; `depth` is the number of blocks of its tower."""

    tower: Literal["vision", "text"]
    block: int
    depth: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        """Its unique name in records: `vision.1`."""
        return f"{self.tower}.{self.block}"

    @property
    def mlp_path(self) -> str:
        """The path of its `mlp` in an open_clip CLIP."""
        prefix = "visual." if self.tower == "vision" else ""
        return f"{prefix}transformer.resblocks.{self.block}.mlp"


@dataclass(frozen=True)
class LayerInit:
    """What a strategy makes of one FFN.

    experts: E modules [T, D] -> [T, D], in the order of their global numbers;
    router_ED: a direction for each expert, [E, D], no bias;
    notes: numbers for the step-0 receipt (ranks kept, agreement rate, ...).

    An expert of another form than `FFN.expert` makes may have a method `merged() -> nn.Module`. It returns the plain
    FFN that computes the same function, with storage of its own. Trained experts are merged before they are saved.
    """

    experts: Sequence[nn.Module]
    router_ED: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)


def merged(expert: Any) -> nn.Module:
    """The plain FFN that computes what `expert` does: `expert.merged()` if it has that method, else itself."""
    return expert.merged() if hasattr(expert, "merged") else expert


def alike(experts: Sequence[Any]) -> bool:
    """Whether all are plain FFNs with the same activation, so that a backend may compute them together."""
    return all(plain(expert) and _activation(expert) == _activation(experts[0]) for expert in experts)


def plain(expert: Any) -> bool:
    """Whether `expert` is what `FFN.expert` makes, with no hook that must see its modules run."""
    if type(expert) is not nn.Sequential or list(expert._modules) != ["c_fc", "gelu", "c_proj"]:
        return False
    c_fc, act, c_proj = parts = expert._modules.values()
    linear = all(type(part) is nn.Linear and part._parameters["bias"] is not None for part in (c_fc, c_proj))
    return linear and not act._parameters and not act._modules and not any(map(_hooked, (expert, *parts)))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(module: Any) -> bool:
    own = module.__dict__  # a layer asks this 30 times a step, and attribute access on a module is slow
    return "forward" in own or any(own[name] for name in _HOOKS)


def _activation(expert: Any) -> tuple[type, dict[str, Any]]:
    """The class of an expert's activation and its settings."""
    act = expert._modules["gelu"]
    return type(act), {name: value for name, value in act.__dict__.items() if name[0] != "_"}
