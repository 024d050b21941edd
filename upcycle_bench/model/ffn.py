"""The dense FFN, where it stands in the network, and what a strategy makes of it: experts and a router.

ffn = FFN.of(model.get_submodule(layer.mlp_path))                               # the dense weights, read-only
init = LayerInit([ffn.expert() for _ in range(layer.num_experts)], router_ED)   # sparse upcycling: copies
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.model.towers import BLOCKS, Tower

FORMS = (("c_fc", "gelu", "c_proj"), ("fc1", "act", "fc2"))  # of open_clip's blocks, of timm's


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
        """The FFN of a block's `mlp`, of one of `FORMS`."""
        first, act, second = (getattr(mlp, name) for name in _form(mlp))
        return cls(first.weight.detach(), first.bias.detach(), second.weight.detach(), second.bias.detach(), act)

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
        """Give a block's `mlp` copies of these tensors; its hidden width may change."""
        made: Any = self.expert()
        first, _, second = _form(mlp)
        setattr(mlp, first, made.c_fc)
        setattr(mlp, second, made.c_proj)

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

    tower: Tower
    block: int
    depth: int
    num_experts: int
    top_k: int
    blocks: str = ""  # the path of the tower's blocks; empty: as in open_clip's class CLIP

    @property
    def name(self) -> str:
        """Its unique name in records: `vision.1`."""
        return f"{self.tower}.{self.block}"

    @property
    def mlp_path(self) -> str:
        """The path of its `mlp` in the model."""
        return f"{self.blocks or BLOCKS[self.tower][0]}.{self.block}.mlp"


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


def linears(mlp: Any) -> tuple[nn.Linear, nn.Linear] | None:
    """The two linear layers of a block's `mlp`; None where it is no FFN of a form in `FORMS`."""
    for form in FORMS:
        first, second = (getattr(mlp, name, None) for name in (form[0], form[2]))
        if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
            return first, second
    return None


def not_plain(mlp: nn.Module) -> str | None:
    """Why `FFN` does not describe a block's `mlp`, or None: another part, no bias, dropout."""
    parts = {name: part for name, part in mlp.named_children() if not _idle(part)}
    if tuple(parts) not in FORMS:
        return f"consists of {', '.join(parts)}"
    if type(mlp).__module__.startswith("timm.") and type(mlp).__name__ != "Mlp":  # others gate what is between
        return f"is a {type(mlp).__name__}"
    without = [name for name, part in parts.items() if isinstance(part, nn.Linear) and part.bias is None]
    return f"has no bias in {' and '.join(without)}" if without else None


def _idle(part: nn.Module) -> bool:
    return isinstance(part, nn.Identity) or (isinstance(part, nn.Dropout) and part.p == 0)


def _form(mlp: Any) -> tuple[str, str, str]:
    return next((form for form in FORMS if hasattr(mlp, form[0])), FORMS[0])


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
