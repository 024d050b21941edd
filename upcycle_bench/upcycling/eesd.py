"""Expert-ensemble self-distillation, EESD (arXiv:2604.13508, Eqs. 11 to 13), for strategies that train with it.

    class MyIdea(Distilled): ...          # adds the options eesd_* and the training term

In each MoE layer an ensemble of all experts teaches the top-k mixture y. The ensemble's router and experts are moving
averages (EMA) of those that are trained:

    Eq. 11      y_ens = sum_e g_e(x) E_e(x), with the averaged g and E;  theta_ema <- a theta_ema + (1 - a) theta
    Eq. 12      L_EESD = mean over tokens of |y - y_ens|^2, with no gradient to y_ens

The text we hold lost the formulas: these forms fit its sentences.

The paper's numbers belong to its trainings and its widths. Here they keep their meaning in a training of other size:
- Its EMA of 0.999 remembers 1,000 steps, 1.26 % of the 79,346 that it trains ViT-B/32. `eesd_memory` is that share.
- Its weights go with a sum over 768 or 512 features. At equal size of the features, which pre-LN transformers have at
  any width, a sum grows with the width and the contrastive loss does not. So at width D the sum is multiplied by
  768 / D in the vision tower and by 512 / D in the text tower: it is the mean over features, times the paper's width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.model.routes import Routes
from upcycle_bench.strategy import ExtraLoss, MoEFFN, Strategy
from upcycle_bench.util import distributed
from upcycle_bench.util.distributed import mean_weight
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

PAPER_WIDTH = {"vision": 768, "text": 512}  # of ViT-B, for which the paper states its weights
PAPER_MEMORY = 0.0126  # 1,000 steps, the memory of 0.999, of the 1.3B / 16,384 = 79,346 steps of ViT-B/32
FOOTING = "teacher's FLOPs charged"
RECONSTRUCTED = (
    "EESD summed over features (as at the paper's widths, 768 and 512), averaged over layers (not stated)",
    "EESD's EMA remembers the share of the training that it does for ViT-B/32 (published: 0.999)",
    "EESD includes tokens that capacity dropped (not stated)",
)


@dataclass(frozen=True, kw_only=True)
class Distilled(Strategy):
    """Base class of strategies that train with EESD: its options and its loss."""

    eesd_weight: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="0: no distillation; the paper's B/16 has 0.1"
    )
    eesd_memory: float | None = Field(
        default=None, gt=0, le=1, description=f"share of the training's steps that the EMA remembers [{PAPER_MEMORY}]"
    )
    eesd_ema: float | None = Field(default=None, ge=0, le=1, description="in place of `eesd_memory`: the EMA itself")
    eesd_feature_reduction: Literal["paper", "sum", "mean"] = Field(
        default="paper", description="paper: the mean times the paper's width, 768 (vision) or 512 (text)"
    )
    eesd_layer_reduction: Literal["sum", "mean"] = "mean"
    eesd_tokens: float = Field(default=1.0, gt=0, le=1, description="share of tokens, drawn at each step, it sees")
    eesd_mask_dropped: bool = Field(default=False, description="leave out tokens that lost a choice to capacity")

    def __post_init__(self) -> None:
        if self.eesd_ema is not None and self.eesd_memory is not None:
            raise UserError("eesd_ema (given, or the protocol's) and eesd_memory exclude each other; give eesd_ema.")

    def loss(self, layers: Mapping[str, MoEFFN], rng: Stream, steps: int) -> ExtraLoss | None:
        return EESD(self, layers, rng, steps) if self.eesd_weight > 0 else None

    def ema(self, steps: int) -> float:
        """a of Eq. 11 in a training of `steps`: a memory of m steps is 1 - 1/m, and no memory is shorter than one."""
        memory = PAPER_MEMORY if self.eesd_memory is None else self.eesd_memory
        return 1 - 1 / max(1.0, memory * steps) if self.eesd_ema is None else self.eesd_ema

    def feature_factor(self, layer: MoEFFN) -> float:
        """What the sum over features is multiplied by in this layer."""
        width = layer.router_weight.shape[1]
        return {"sum": 1.0, "mean": 1 / width, "paper": PAPER_WIDTH[layer.place.tower] / width}[
            self.eesd_feature_reduction
        ]


class EESD(ExtraLoss):
    """The training term: one teacher a layer, and Eq. 12 between the layer's output and the teacher's.

    A teacher sees the layer's own input, without text padding. It runs every expert on every token, without capacity,
    and is never trained. Tokens that lost a choice to capacity count, unless `eesd_mask_dropped` says otherwise.
    With expert parallelism each rank keeps the teachers of its own experts and gathers the tokens of its group.
    """

    name: ClassVar[str] = "eesd"

    def __init__(self, config: Distilled, layers: Mapping[str, MoEFFN], rng: Stream, steps: int) -> None:
        self.config, self.rng = config, rng
        self.ema = config.ema(steps)
        self.factor = {name: config.feature_factor(layer) for name, layer in layers.items()}
        self.step = 0  # of the optimiser; tokens are drawn anew at each
        self.layers = dict(layers)
        self.teacher = {name: _Teacher(layer) for name, layer in layers.items()}
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}  # each layer's input and output [T, D] in this forward pass
        self.whole: dict[str, Tensor] = {}  # which tokens kept all their choices, bool [T]
        self.handles = [layer.moe.register_forward_hook(self._hook(name)) for name, layer in layers.items()]
        if config.eesd_mask_dropped:
            self.handles += [layer.gate.register_forward_hook(self._gate_hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            if module.training:
                self.seen[name] = (args[0], output[0])

        return keep

    def _gate_hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], routes: Routes) -> None:
            if module.training:
                self.whole[name] = (routes.index_KT >= 0).all(0)  # -1: dropped

        return keep

    def _chosen(self, name: str, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that the loss sees: `eesd_tokens` of those that are not masked, at least one if there is one."""
        if self.config.eesd_mask_dropped:
            kept_T = self.whole[name].nonzero().squeeze(1)
            x_TD, y_TD = x_TD[kept_T], y_TD[kept_T]
        if self.config.eesd_tokens < 1:
            generator = self.rng.child("eesd tokens", name, self.step, distributed.rank()).generator()
            count = max(1, round(self.config.eesd_tokens * len(x_TD)))
            drawn_T = torch.randperm(len(x_TD), generator=generator)[:count].to(x_TD.device)
            x_TD, y_TD = x_TD[drawn_T], y_TD[drawn_T]
        return x_TD, y_TD

    def compute(self) -> Tensor:
        """The term of Eq. 13: `eesd_weight` times Eq. 12, reduced over layers.

        Its mean over ranks is the term of the global batch.
        """
        terms = []
        for name in self.layers:
            if name not in self.seen:
                continue
            x_TD, y_TD = self._chosen(name, *self.seen[name])
            target_TD = self.teacher[name].ensemble(x_TD)  # Eq. 11
            error_TD = (y_TD.float() - target_TD.float()).square()  # Eq. 12
            error_T = self.factor[name] * error_TD.sum(1)
            terms.append(error_T.sum() * mean_weight(len(error_T)))  # the mean over the tokens of all ranks
        self.seen.clear()
        self.whole.clear()
        total = torch.stack(terms).sum()
        return self.config.eesd_weight * (total if self.config.eesd_layer_reduction == "sum" else total / len(terms))

    def notes(self) -> dict[str, float]:
        """The EMA, its memory in steps (0: endless), and the factor on the sum over features of each tower."""
        factors = {f"eesd_factor_{self.layers[name].place.tower}": factor for name, factor in self.factor.items()}
        return {"eesd_ema": self.ema, "eesd_memory_steps": 1 / (1 - self.ema) if self.ema < 1 else 0.0, **factors}

    def after_step(self) -> None:
        """Move the teachers (Eq. 11)."""
        for name, layer in self.layers.items():
            self.teacher[name].follow(layer, self.ema)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        teachers = {name: teacher.state_dict() for name, teacher in self.teacher.items()}
        return {"step": self.step, "teachers": teachers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for name, teacher in self.teacher.items():
            teacher.load_state_dict(state["teachers"][name])

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen.clear()


class _Teacher(nn.Module):
    """EMA copies of one layer's router and of this rank's experts."""

    def __init__(self, layer: MoEFFN) -> None:
        super().__init__()
        self.router_ED = nn.Parameter(layer.router_weight.detach().clone(), requires_grad=False)
        self.experts = copy.deepcopy(layer.experts).requires_grad_(False)
        self.layer = (layer,)  # a tuple hides it from nn.Module: the teacher must not own the layer's parameters

    @torch.no_grad()
    def ensemble(self, x_TD: Tensor) -> Tensor:
        """sum_e g_e(x) E_e(x) over all E experts, g the softmax over all (Eq. 11), [T, D] float32 or wider."""
        (layer,) = self.layer
        ranks = layer.settings.ep_size
        if ranks == 1:
            return self._partial_sum(x_TD.detach(), 0)
        # Ranks have different numbers of tokens. All pad to the longest, and each adds the terms of its own experts.
        group = layer.expert_group
        lengths = [torch.zeros(1, dtype=torch.long, device=x_TD.device) for _ in range(ranks)]
        dist.all_gather(lengths, torch.tensor([len(x_TD)], device=x_TD.device), group=group)
        longest = int(max(lengths))
        padded_TD = F.pad(x_TD.detach(), (0, 0, 0, longest - len(x_TD)))
        gathered = [torch.empty_like(padded_TD) for _ in range(ranks)]
        dist.all_gather(gathered, padded_TD.contiguous(), group=group)
        rank = dist.get_rank(group)
        total_TD = self._partial_sum(torch.cat(gathered), rank * len(self.experts))
        dist.all_reduce(total_TD, group=group)
        return total_TD[rank * longest :][: len(x_TD)]

    def _partial_sum(self, x_TD: Tensor, first_expert: int) -> Tensor:
        """The terms of Eq. 11 of this rank's experts, which are numbered from `first_expert` on, [T, D]."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):  # logits in float32, as in the student's gate
            gate_TE = torch.softmax(x_TD.to(dtype) @ self.router_ED.to(dtype).T, dim=1)
        total_TD = torch.zeros(x_TD.shape, dtype=dtype, device=x_TD.device)
        for number, expert in enumerate(self.experts, start=first_expert):
            total_TD.addcmul_(gate_TE[:, number : number + 1], expert(x_TD).to(dtype))
        return total_TD

    @torch.no_grad()
    def follow(self, layer: MoEFFN, alpha: float) -> None:
        """theta_ema <- alpha theta_ema + (1 - alpha) theta."""
        own: list[Tensor] = list(self.parameters())
        student = [layer.router_weight, *layer.experts.parameters()]
        torch._foreach_lerp_(own, [parameter.detach() for parameter in student], 1 - alpha)
