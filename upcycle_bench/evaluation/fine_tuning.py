"""End-to-end fine-tuning of a CLIP's image tower, in DeepSpeed's engine, from the zero-shot classifier.

    tuned = tune(model, classes_YC, train, validation, recipe, Stream(("fine-tune", "digits", 5, 0)), context, "digits")
    logits_NY, label_N = predict(tuned.classifier, test, context)

The head is linear on normalised features. It begins as logit scale x class embeddings, so that at step 0 it answers as
the zero-shot classifier does (WiSE-FT's). Every learning rate of the grid starts from the same weights and sees the
same batches; the one with the best validation accuracy is kept. MoE layers train as in upcycling, with capacity,
dropped tokens and the load-balancing loss. The model itself does not change: its tower is copied.

Source: M. Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903.
Shape suffixes: N samples, S steps, Y classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.data.labelled import Labelled
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.precision import attention_kernel, autocast
from upcycle_bench.model.towers import longest_sequence
from upcycle_bench.protocol import Schedule, learning_rate
from upcycle_bench.suite import EvalContext
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import create_engine
from upcycle_bench.training.step import load_balance
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

WARMUP = 0.1  # of the steps; then linear to zero, as in all our training
BETAS, EPS, GRAD_CLIP = (0.9, 0.999), 1e-8, 1.0
MEMORY = 8 << 30  # bytes of decoded training images, at most


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of fine-tuning, equal for every model.

    `rates`: peak learning rates in ascending order; `batch_size`: at most, where there are fewer samples;
    `load_balance`: coefficient of the load-balancing loss.
    """

    rates: tuple[float, ...]
    steps: int
    batch_size: int
    weight_decay: float
    load_balance: float
    precision: Literal["fp32", "bf16"]


class Classifier(nn.Module):
    """An image tower and a linear head without bias on its normalised features: images [B, 3, H, W] -> logits [B, Y].

    `precision` holds in training; in evaluation mode the tower computes in float32.
    """

    def __init__(self, tower: nn.Module, head_YC: Tensor, precision: str) -> None:
        super().__init__()
        self.tower, self.precision = tower, precision
        self.head = nn.Linear(head_YC.shape[1], head_YC.shape[0], bias=False)
        self.head.weight = nn.Parameter(head_YC)

    def features(self, images: Tensor) -> Tensor:
        """Normalised, float32 [B, C]."""
        with autocast(images.device, self.precision if self.training else "fp32"):
            features_BC = self.tower(images)
        return F.normalize(features_BC.float(), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class Tuned:
    """The classifier of the rate that does best on validation.

    `accuracies`: rate, ascending -> validation accuracy, None where training diverged; `accuracy_before`: at step 0.
    """

    classifier: Classifier
    rate: float
    accuracies: Mapping[float, float | None]
    accuracy_before: float

    @property
    def at_the_edge(self) -> bool:
        """Whether an end of the grid is better than all rates within, so that a rate outside may do better still."""
        first, *within, last = self.accuracies
        best = self.accuracies[self.rate]
        assert best is not None, "training at the chosen rate went through"
        return self.rate in (first, last) and best > max(
            (value for rate in within if (value := self.accuracies[rate]) is not None), default=-1.0
        )


def zero_shot_classifier(model: Any, classes_YC: Tensor, precision: str = "fp32") -> Classifier:
    """A copy of the model's image tower under the zero-shot head; UserError for a tower that is no ViT of open_clip's.

    The copy has no patch dropout. A file of weights does not name it, so it would depend on where the model comes from.
    """
    from open_clip.transformer import VisionTransformer

    tower = getattr(model, "visual", None)
    if not isinstance(tower, VisionTransformer) or tower.output_tokens:
        raise UserError(f"{type(model).__name__}: only open_clip's ViT CLIP models can be fine-tuned; score another.")
    tower = copy.deepcopy(tower)
    tower.patch_dropout = nn.Identity()
    scale = model.logit_scale.detach().exp()
    return Classifier(tower, scale * classes_YC.to(scale.device), precision).requires_grad_(True)


def tune(
    model: Any,
    classes_YC: Tensor,
    training: Labelled,
    validation: Labelled,
    recipe: Recipe,
    rng: Stream,
    context: EvalContext,
    title: str,
) -> Tuned:
    """Train at each rate on the batches of `rng`; of equal accuracies the lower rate wins. Needs an open session.

    Raises UserError where training at every rate diverges, where the training images do not fit into memory, and in
    several processes. There one process evaluates while the others wait, and DeepSpeed's collectives would hang.
    """
    if distributed.world_size() > 1:
        raise UserError("fine-tune is the work of one process; score the record with `upcycle-bench evaluate RECORD`.")
    images_N3HW, label_N = _in_memory(training, context)
    rows_SB = batch_rows(len(label_N), recipe.steps, recipe.batch_size, rng.child("order"))
    before = zero_shot_classifier(model, classes_YC)
    accuracy_before = _accuracy(before, validation, context)
    assert accuracy_before is not None, "the class embeddings are finite, and so were the features"
    accuracies: dict[float, float | None] = {}
    best: tuple[float, float, Classifier] | None = None
    with attention_kernel(context.device, longest_sequence(model)):
        for rate in context.track(recipe.rates, f"{title}: learning rates"):
            classifier = zero_shot_classifier(model, classes_YC, recipe.precision)
            with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
                torch.manual_seed(rng.child("sampling").seed())  # some layers draw the second expert of a token
                train(classifier, images_N3HW, label_N, rows_SB, rate, recipe)
            accuracy = accuracies[rate] = _accuracy(classifier, validation, context)
            if accuracy is not None and (best is None or accuracy > best[0]):
                best = accuracy, rate, classifier
    if best is None:
        raise UserError(f"{title}: training diverged at every learning rate; lower `rates`.")
    return Tuned(best[2], best[1], accuracies, accuracy_before)


def predict(classifier: Classifier, samples: Labelled, context: EvalContext) -> tuple[Tensor, Tensor]:
    """Logits [N, Y] and labels [N], on the CPU.

    The tower is in float32, the head in float64, so that rounding breaks no tie.
    """
    classifier.eval()
    logits, labels = [], []
    head_YC = classifier.head.weight.detach().double()
    with torch.no_grad():
        for images_B3HW, label_B in samples.batches(context.transform, context.batch_size):
            features_BC = classifier.features(images_B3HW.to(context.device))
            logits.append((features_BC.double() @ head_YC.T).cpu())
            labels.append(label_B)
    return torch.cat(logits), torch.cat(labels)


def batch_rows(samples: int, steps: int, batch_size: int, rng: Stream) -> Tensor:
    """Rows of the batches, int64 [S, B]. As in training, an epoch is a permutation without an incomplete last batch."""
    size = min(batch_size, samples)
    per_epoch = samples // size
    epochs = [
        torch.randperm(samples, generator=rng.child(epoch).generator())[: per_epoch * size].view(per_epoch, size)
        for epoch in range(math.ceil(steps / per_epoch))
    ]
    return torch.cat(epochs)[:steps]


def losses(logits_BY: Tensor, label_B: Tensor, layers: Mapping[str, MoEFFN], coefficient: float) -> dict[str, Tensor]:
    """The terms of the loss by name, to be summed; `layers` have just made the forward pass, in training mode."""
    terms = {"cross_entropy": F.cross_entropy(logits_BY, label_B)}
    if layers:
        terms["load_balance"] = load_balance(layers, coefficient)
    return terms


def train(
    classifier: Classifier, images_N3HW: Tensor, label_N: Tensor, rows_SB: Tensor, rate: float, recipe: Recipe
) -> None:
    """Train in place with a fresh optimiser. A row of `rows_SB` is a batch, `rate` the peak learning rate."""
    device = classifier.head.weight.device
    layers = moe_layers(classifier)
    schedule = _schedule(recipe, batch_size=max(2, rows_SB.shape[1]))
    job = Job(purpose="fine-tune", schedule=schedule, peak_lr=rate, stop_step=recipe.steps, seed=0)
    ds_engine = create_engine(classifier.train(), job)
    for step, row_B in enumerate(rows_SB):
        for group in ds_engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, rate, WARMUP)
        logits_BY = ds_engine(images_N3HW[row_B].to(device))
        terms = losses(logits_BY, label_N[row_B].to(device), layers, recipe.load_balance)
        ds_engine.backward(torch.stack(list(terms.values())).sum())
        ds_engine.step()
    ds_engine.destroy()


def _schedule(recipe: Recipe, batch_size: int) -> Schedule:
    """The recipe as `create_engine` reads it."""
    return Schedule(
        steps=recipe.steps,
        batch_size=batch_size,
        warmup_fraction=WARMUP,
        betas=BETAS,
        eps=EPS,
        weight_decay=recipe.weight_decay,
        grad_clip=GRAD_CLIP,
        patch_dropout=0.0,
        augmentation="none",
        precision=recipe.precision,
        logit_scale_max=math.log(100),
    )


def _accuracy(classifier: Classifier, samples: Labelled, context: EvalContext) -> float | None:
    """Share of right answers; None where training diverged."""
    logits_NY, label_N = predict(classifier, samples, context)
    if not logits_NY.isfinite().all():
        return None
    return float((logits_NY.argmax(dim=1) == label_N).double().mean())


def _in_memory(samples: Labelled, context: EvalContext) -> tuple[Tensor, Tensor]:
    """All training images [N, 3, H, W] and labels [N], decoded once, since every epoch and every rate shows them."""
    first, _ = next(samples.batches(context.transform, 1))
    needed = len(samples) * first.numel() * first.element_size()
    if needed > MEMORY:
        raise UserError(
            f"{len(samples)} training images would take {needed / 2**30:.0f} GiB of memory, more than "
            f"{MEMORY / 2**30:.0f}; fine-tune on shots, or name a smaller pool."
        )
    parts = list(samples.batches(context.transform, context.batch_size))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
