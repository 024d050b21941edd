"""CLIP-MoE, Diversified Multiplet Upcycling (Zhang et al., EMNLP 2025, https://arxiv.org/abs/2409.19291), a baseline.

Experts are FFNs of CLIPs that were trained to see different things, by multistage contrastive learning (Zhang et al.,
ECCV 2024, arXiv:2402.11816). Before each stage the model of the stage before sorts the data into clusters. The stage
starts from the dense model again and trains its FFNs alone, on batches from one cluster each: what was learned before
does not tell such pairs apart, so the stage must learn something new.

    c_s = M c_text + c_image              stage s: k-means with M = 3 of each modality's features under theta_{s-1}
    a_s = (M^2 a_{s-1} + c_s) mod M^(2 A)     labels of the last A stages as one; a_0 = 0
    theta_s: from theta_0, batches homogeneous in a_s, clusters visited in turn, those smaller than a batch skipped

Expert 0 is the dense FFN, expert s that of theta_s; all other weights are the dense model's; the router is random.
The stages may cost `budget` times the training that follows. The published recipe gives each stage an epoch of the
data. Where the budget pays only n steps, all stages cluster and train on the same random samples, enough for n batches.
A is at most 3, and no more than leaves a mean cluster a batch, M^(2 A) <= n. The published three stages do: they make
729 clusters of 1.2 million samples, 1,500 batches of 800.

Where we differ: batch size, schedule and optimiser are the protocol's (the code: batches of 800, cosine, warm-up 200).
The learning rate is `lr_factor` times the protocol's peak, the dense model's own rate where it was stopped; the code's
1e-5 is for a CLIP at the end of its training. k-means is fitted on at most 1,000,000 samples, one batch of the code's.
All parameters are trained afterwards, not the gates alone, as for every strategy. Experts have no dropout.

Shape suffixes: S samples, M clusters of a modality.
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
from upcycle_bench.upcycling.clustering import minibatch_kmeans, nearest
from upcycle_bench.upcycling.preparation import BranchStrategy

FITTED_SAMPLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ClipMoE(BranchStrategy):
    """Experts are the dense FFN and those of multistage contrastive learning, the router is random."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="clip-moe",
        summary="the FFN and those of stages of contrastive learning within clusters, random router",
        paper="Zhang et al., CLIP-MoE, EMNLP 2025, arXiv:2409.19291",
        url="https://arxiv.org/abs/2409.19291",
        status="published",
        footing="trains branches first, charged",
        reconstructed=(
            "as a baseline of arXiv:2604.13508: 8 experts, every other block, then the training that all have",
            "labels are accumulated over 3 stages at most, while a mean cluster fills a batch (max_accumulated_stages)",
            "stages shortened to a budget of training FLOPs (option budget)",
            "learning rate (option lr_factor; published: 1e-5), batch, schedule, optimiser of a stage: the protocol's",
            "no router tuning (all parameters are trained instead), no dropout inside experts",
        ),
    )

    clusters: int = Field(default=3, ge=1, description="k-means clusters of each modality in each stage")
    max_accumulated_stages: int = Field(default=3, ge=1, description="upper limit of stages whose labels are combined")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)

    def prepare(self, workshop: Workshop) -> Preparation:
        stages, batch_size = workshop.experts - 1, workshop.batch_size
        epoch = len(workshop) // batch_size
        steps = workshop.steps_per_branch(
            stages, epoch, budget=self.budget, encoded_per_step=batch_size, trainable=in_ffn
        )
        samples = len(workshop) if steps == epoch else steps * batch_size
        index_S = draws.permutation(len(workshop), workshop.rng.child("samples"))[:samples]
        label_S = torch.zeros(samples, dtype=torch.long)  # a_0
        together = depth(steps, self.clusters, self.max_accumulated_stages)  # A
        notes: dict[str, float] = {"samples": samples, "accumulated stages": together}
        models = [workshop.dense()]  # theta_0, theta_1, ...
        for stage in range(1, stages + 1):
            rng, name = workshop.rng.child("stage", stage), f"stage {stage} of {stages}"
            stage_label_S = stage_labels(workshop, models[-1], index_S, self.clusters, rng)
            label_S = accumulate(label_S, stage_label_S, self.clusters, together)
            rows_SB, lost = cluster_batches(label_S, batch_size, rng.child("batches"))
            if not len(rows_SB):
                raise UserError(
                    f"{self.info.name}: {name}: all {len(label_S.unique())} clusters of {samples} samples are smaller "
                    f"than a batch of {batch_size}; lower clusters or raise budget."
                )
            model = workshop.dense()
            options = {"lr_factor": self.lr_factor, "label_smoothing": self.label_smoothing}
            workshop.train(model, index_S[rows_SB], name, trainable=in_ffn, **options)
            models.append(model)
            notes |= {f"stage {stage} steps": len(rows_SB), f"stage {stage} share in skipped clusters": lost}
        return Preparation(models[0], models[1:], notes)

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Sequence[FFN], rng: Stream) -> LayerInit:
        experts = [ffn.expert(), *(stage.expert() for stage in calibration)]
        return LayerInit(experts, random_router(ffn, layer, rng, self.router_init))


def in_ffn(name: str) -> bool:
    """Whether a stage trains the parameter of that name: those of the FFNs of both towers."""
    return "mlp" in name


def stage_labels(workshop: Workshop, model: Any, index_S: Tensor, clusters: int, rng: Stream) -> Tensor:
    """c_s = M c_text + c_image of the samples, int64 [S]; k-means is fitted on the first `FITTED_SAMPLES` of them."""
    fitted_S, rest_S = index_S[:FITTED_SAMPLES], index_S[FITTED_SAMPLES:]
    image_SC, text_SC = (torch.cat(parts) for parts in zip(*workshop.encode(model, fitted_S), strict=True))
    image_MC = minibatch_kmeans(image_SC, clusters, rng.child("image"))
    text_MC = minibatch_kmeans(text_SC, clusters, rng.child("text"))
    labels = [clusters * nearest(text_SC, text_MC) + nearest(image_SC, image_MC)]
    for image_BC, text_BC in workshop.encode(model, rest_S):
        labels.append(clusters * nearest(text_BC, text_MC) + nearest(image_BC, image_MC))
    return workshop.from_main(torch.cat(labels))  # a rounding must not give ranks different labels


def depth(batches: int, clusters: int, most: int) -> int:
    """A: of how many stages labels come together. One at least; more while a mean cluster fills one of the batches."""
    return max(1, sum(clusters ** (2 * stages) <= batches for stages in range(1, most + 1)))


def accumulate(before_S: Tensor, stage_S: Tensor, clusters: int, stages: int) -> Tensor:
    """a_s [S] of a_{s-1} and c_s: the last `stages` labels as the digits of one number, the newest last."""
    radix = clusters**2
    return (radix * before_S + stage_S) % radix**stages


def cluster_batches(label_S: Tensor, batch_size: int, rng: Stream) -> tuple[Tensor, float]:
    """One epoch of batches from one cluster each, int64 [steps, B], and the share of samples in skipped clusters.

    Clusters take turns in the order of their labels. Within one the order is random, without an incomplete last batch.
    """
    order_S = draws.permutation(len(label_S), rng)
    order_S = order_S[label_S[order_S].argsort(stable=True)]
    sizes = label_S.unique(return_counts=True)[1]
    kept = [members for members in order_S.split(sizes.tolist()) if len(members) >= batch_size]
    queues = [members[: len(members) // batch_size * batch_size].view(-1, batch_size) for members in kept]
    turns = range(max(map(len, queues), default=0))
    rows = [queue[turn] for turn in turns for queue in queues if turn < len(queue)]
    lost = 1 - sum(map(len, kept)) / len(label_S)
    return torch.stack(rows) if rows else torch.empty(0, batch_size, dtype=torch.long), lost


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [ClipMoE]
