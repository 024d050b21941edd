"""A user's own batches as the calibration data of `make_experts`: checked, counted, on the model's device.

    inits = make_experts(strategy, model, moe, seed, CalibrationPairs(strategy.info.name, model, loader))

`loader` yields (images [B, 3, H, W] as the model takes them, texts [B, L]).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from upcycle_bench.model.towers import context_length, image_size, image_weight, vocab_size
from upcycle_bench.util.errors import UserError


class CalibrationPairs:
    """Batches of (images [B, 3, H, W], texts [B, L]), of which a call gives as many pairs as it is asked for.

    They come on the model's device, images in its dtype. A call raises UserError for other batches or none at all, and
    warns when there are fewer pairs than the strategy (named by `strategy`) asks for.
    """

    def __init__(self, strategy: str, model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.strategy, self.model, self.batches = strategy, model, batches
        self.seen = 0

    def __call__(self, pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        weight = image_weight(self.model)
        for number, batch in enumerate(_iterable(self.batches)):
            if problem := next(_problems(batch, self.model), None):
                raise UserError(f"calibration, batch {number}: {problem}.")
            images, texts = batch
            images, texts = images[: pairs - self.seen], texts[: pairs - self.seen]
            self.seen += len(images)
            yield images.to(weight), texts.to(weight.device)
            if self.seen >= pairs:
                return
        if not self.seen:
            raise UserError(f"{self.strategy}: the calibration data are empty; it asks for {pairs:,} image-text pairs.")
        warnings.warn(
            f"{self.strategy} asks for {pairs:,} calibration pairs and saw {self.seen:,}; its statistics rest on "
            "these.",
            stacklevel=2,
        )


def _iterable(batches: Any) -> Iterable[Any]:
    """The user's loader. UserError for what cannot be looped over, such as a function."""
    try:
        iter(batches)
    except TypeError:
        raise UserError(
            f"calibration is a {type(batches).__name__}, which cannot be looped over; give a loader or a list of "
            "(images, texts) batches."
        ) from None
    return batches


def _problems(batch: Any, model: Any) -> Iterator[str]:
    """What is wrong with a user's batch for that open_clip CLIP; a line supposes that those before it do not hold."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        yield f"a batch must be two tensors, images [B, 3, H, W] and tokenised texts [B, L], but this is {_kind(batch)}"
    images, texts = batch
    wanted = (image_weight(model).shape[1], *image_size(model))
    if images.dim() != 4 or images.shape[1:] != wanted:
        yield f"images are {list(images.shape)}, the model takes [B, {', '.join(map(str, wanted))}]; use its transform"
    if texts.dim() != 2 or texts.shape[1] != context_length(model):
        yield f"texts are {list(texts.shape)}, the model takes [B, {context_length(model)}]; use its tokenizer"
    if len(images) != len(texts) or not len(images):
        yield f"{len(images)} images and {len(texts)} texts; give each image its text, and no empty batch"
    if not images.is_floating_point() or images.itemsize < 2 or texts.dtype not in (torch.int64, torch.int32):
        yield (
            f"images are {images.dtype} and texts {texts.dtype}; give images as the model takes them (floats, after "
            "its transform) and token numbers (int64)"
        )
    if any(part.is_meta or part.layout is not torch.strided for part in batch):
        yield "a tensor is sparse or has no values (device meta); give ordinary ones"
    if bad := int((~images.isfinite()).sum()):
        yield f"images have {bad:,} values of {images.numel():,} that are NaN or infinite; leave such images out"
    low, high = int(texts.min()), int(texts.max())
    if low < 0 or high >= vocab_size(model):
        yield f"token numbers are {low} to {high}, the model's 0 to {vocab_size(model) - 1}; use its tokenizer"


def _kind(batch: Any) -> str:
    """What a user gave, in a few words: `a dict of images, texts`, `a tuple of Tensor, list`."""
    if isinstance(batch, dict):
        parts = [str(key) for key in batch]
    else:
        parts = [type(part).__name__ for part in batch] if isinstance(batch, tuple | list) else []
    of = f" of {', '.join(parts[:4])}{', ...' if len(parts) > 4 else ''}" if parts else ""
    return f"a {type(batch).__name__}{of}"
