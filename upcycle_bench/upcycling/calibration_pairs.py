"""A user's own batches as the calibration data of `make_experts`: checked, counted, on the model's device.

    inits = make_experts(strategy, model, moe, seed, CalibrationPairs(strategy.info.name, model, loader))

`loader` yields (images [B, 3, H, W] as the model takes them, texts [B, L]).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from upcycle_bench.model.towers import image_weight
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
        for batch in self.batches:
            images, texts = _checked(batch)
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


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and texts of a user's batch. UserError says what is wrong with another."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        raise UserError("calibration: a batch must be two tensors, images [B, 3, H, W] and tokenised texts [B, L].")
    images, texts = batch
    if images.dim() != 4 or texts.dim() != 2 or len(images) != len(texts):
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise UserError(f"calibration: images [B, 3, H, W] and texts [B, L] are wanted, but their shapes are {shapes}.")
    if not images.is_floating_point() or texts.is_floating_point():
        raise UserError(
            f"calibration: images are {images.dtype} and texts {texts.dtype}; give images as the model takes them "
            "(floats, after its transform) and token numbers."
        )
    return images, texts
