"""Branch-Train-MiX, BTX (Sukhbaatar et al., 2024, arXiv:2403.07816, https://arxiv.org/abs/2403.07816).

Copies of the dense model, the branches, are trained apart, each with all its parameters and on one domain of the data.
Their FFNs become the experts, all other parameters are averaged over the branches, and the router is random.

Domains are made of the groups that the data have. The lab's lineages or the digits' classes are gathered into domains
of about equal size: the largest first, each into the domain that is smallest so far. Other data are cut into runs of
shards. There are as many branches as experts, unless `branches` says otherwise: expert e of E is then branch
floor(e * branches / E). All branches together may cost `budget` times the training that follows. Each trains as many
steps as that pays, but at most `epochs` of its domain.

Where we differ: the paper trains Llama-2 7B on 42 to 210 billion tokens for each of three domains and keeps the seed
model as a fourth expert. Here every expert has a domain and the budget is small, because strategies are compared at
equal cost. The average includes the FFNs of blocks that stay dense; the paper replaces all blocks. Optimiser, schedule
and batch size are the protocol's, with `lr_factor` times its peak learning rate.

Shape suffixes: S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import (
    FFN,
    Groups,
    Layer,
    LayerInit,
    Preparation,
    Strategy,
    StrategyInfo,
    Stream,
    UserError,
    Workshop,
    random_router,
)
from upcycle_bench.upcycling import draws
from upcycle_bench.upcycling.preparation import BranchStrategy


@dataclass(frozen=True, kw_only=True)
class BTX(BranchStrategy):
    """Experts are FFNs of branches trained on domains, everything else is averaged, the router is random."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="btx",
        summary="FFNs of branches trained on domains of the data, all else averaged, random router",
        paper="Sukhbaatar et al., Branch-Train-MiX, 2024, arXiv:2403.07816",
        url="https://arxiv.org/abs/2403.07816",
        status="published",
        footing="trains branches first, charged",
        reconstructed=(
            "domains of image-text data: groups gathered into as many domains of equal size as there are experts",
            "branches shortened to a budget of training FLOPs (option budget), at most an epoch of the domain",
            "learning rate of the branches: the protocol's peak (option lr_factor)",
        ),
    )

    branches: int = Field(default=0, ge=0, description="0: as many as experts")
    epochs: int = Field(default=1, ge=1, description="of its domain that a branch trains at most")

    def prepare(self, workshop: Workshop) -> Preparation:
        number, batch_size = self.branches or workshop.experts, workshop.batch_size
        if number > workshop.experts:
            raise UserError(f"{self.info.name}: branches={number} exceeds the {workshop.experts} experts; lower it.")
        found = domains(workshop.groups(), number)
        smallest = min(map(len, found))
        if smallest < batch_size:
            raise UserError(
                f"{self.info.name}: one of {number} domains has {smallest} samples, fewer than a batch of "
                f"{batch_size}; set branches to a smaller number."
            )
        ceilings = [self.epochs * (len(domain_S) // batch_size) for domain_S in found]
        paid = workshop.steps_per_branch(number, max(ceilings), budget=self.budget)
        branches: list[Any] = []
        notes: dict[str, float] = {}
        for place, (domain_S, ceiling) in enumerate(zip(found, ceilings, strict=True)):
            steps = min(paid, ceiling)
            rows_SB = domain_batches(domain_S, batch_size, steps, workshop.rng.child("domain", place))
            branch = workshop.dense()
            workshop.train(branch, rows_SB, f"branch {place + 1} of {number}", lr_factor=self.lr_factor)
            branches.append(branch)
            notes |= {f"branch {place + 1} steps": steps, f"branch {place + 1} samples": len(domain_S)}
        return Preparation(average(workshop.dense(), branches), branches, notes)

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Sequence[FFN], rng: Stream) -> LayerInit:
        branches, experts = len(calibration), layer.num_experts
        return LayerInit(
            [calibration[expert * branches // experts].expert() for expert in range(experts)],
            random_router(ffn, layer, rng, self.router_init),
        )


def domains(groups: Groups, number: int) -> list[Tensor]:
    """The samples of each domain, int64 [S] ascending; every sample is in one. UserError for too few groups."""
    size_of = groups.number_S.bincount().tolist()
    if len(size_of) < number:
        raise UserError(
            f"btx: the data have {len(size_of)} {groups.kind}s for {number} domains; set branches={len(size_of)}."
        )
    domain_of = [0] * len(size_of)
    if groups.kind == "shard":  # runs of shards, the first of which are one longer if the number does not divide
        for domain, shards in enumerate(torch.arange(len(size_of)).tensor_split(number)):
            for shard in shards.tolist():
                domain_of[shard] = domain
    else:
        filled = [0] * number
        for group in sorted(range(len(size_of)), key=lambda group: (-size_of[group], group)):
            domain_of[group] = filled.index(min(filled))
            filled[domain_of[group]] += size_of[group]
    domain_S = torch.tensor(domain_of)[groups.number_S]
    return [(domain_S == domain).nonzero().squeeze(1) for domain in range(number)]


def domain_batches(domain_S: Tensor, batch_size: int, steps: int, rng: Stream) -> Tensor:
    """Batches of a domain, int64 [steps, B]: epochs in random orders, each without its incomplete last batch."""
    per_epoch = len(domain_S) // batch_size
    epochs = []
    for epoch in range(-(-steps // per_epoch)):
        order_S = draws.permutation(len(domain_S), rng.child("epoch", epoch))
        epochs.append(domain_S[order_S[: per_epoch * batch_size]].view(per_epoch, batch_size))
    return torch.cat(epochs)[:steps]


@torch.no_grad()
def average(model: Any, branches: Sequence[Any]) -> Any:
    """`model`, each of whose parameters becomes the mean of the branches' (in float64)."""
    states = [dict(branch.named_parameters()) for branch in branches]
    for name, parameter in model.named_parameters():
        parameter.copy_(sum(state[name].double() for state in states) / len(states))
    return model


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [BTX]
