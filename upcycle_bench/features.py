"""Embeddings of evaluation sets. Image features are encoded once for each model: the cache knows them by its weights.

    features_ND, beside = encode_images(evalset, context)                   # beside: labels, or captions
    examples = image_features(root / "digits-test", "test", context)       # cached if the weights have a hash

Shape suffixes: N samples, Q queries, C classes, T templates, D embedding, B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench import evalsets, expert_backends
from upcycle_bench.embedding_cache import SPOT, Arrays, remembered
from upcycle_bench.errors import UserError
from upcycle_bench.evalsets import EvalSet
from upcycle_bench.flops import counted_once
from upcycle_bench.probe import Examples
from upcycle_bench.suite import EvalContext
from upcycle_bench.threads import beside as begin


def image_features(folder: Path, split: str, context: EvalContext) -> Examples:
    """Normalised image embeddings and labels of a classification set, on the CPU, from the cache if they are there."""

    def make() -> Arrays:
        made = _encode(folder, split, context)
        return {"features": made.features_ND.numpy(), "labels": made.label_N.numpy()}

    def first() -> Arrays:
        images_B3HW, _ = next(iter(evalsets.read(folder, context.transform, SPOT, split).batches))
        return {"features": embed(context.model.encode_image, images_B3HW, context).numpy()}

    what = ["images", evalsets.digest(folder, split), split] if context.weights else []
    arrays = remembered(what, context, make, first)
    return Examples(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]))


def encode_images(evalset: EvalSet, context: EvalContext) -> tuple[Tensor, list[Any]]:
    """Normalised image embeddings [N, D] and what stands beside each image: its label or its captions.

    Raises UserError for an image that cannot be read, a stratum too few or too many, and numbers that are not finite.
    """
    from webdataset.autodecode import DecodingError

    embeddings, beside = [], []
    try:
        batches = context.track(evalset.batches, f"{evalset.name}: images")
        for embedded_BD, labels_or_captions in _embedded(batches, context):
            embeddings.append(embedded_BD)
            beside.extend(labels_or_captions)
    except DecodingError as error:  # it has no words of its own
        raise UserError(
            f"evaluation set {evalset.name}: the .{error.k} of sample {error.key} cannot be read; `upcycle-bench data "
            "check` says what else is wrong."
        ) from error
    evalsets.require_strata(evalset.name, evalset.strata, len(beside))
    return finite(torch.cat(embeddings), evalset.name), beside


def _embedded(batches: Iterable[tuple[Tensor, Any]], context: EvalContext) -> Iterator[tuple[Tensor, Any]]:
    """Batches of images, embedded, in their order; on a CPU with a core that is free each second one by that.

    FLOPs are counted in the first batch of each size, since a model does the same for each image: but DeepSpeed's layer
    computes as many rows for each expert as the busiest has, so there they are counted in all.
    """
    encode, iterator = context.model.encode_image, iter(batches)
    flops: dict[Any, int] = {}
    alike = expert_backends.forced() != "deepspeed"

    def embedded(images_B3HW: Tensor) -> Tensor:
        with counted_once(flops, images_B3HW.shape) if alike else contextlib.nullcontext():
            return _embed(encode, images_B3HW, context)

    for images_B3HW, labels in iterator:
        if context.device.type != "cpu":
            yield _seen(encode, images_B3HW, embedded(images_B3HW), context), labels
            continue
        given = [images_B3HW]  # taken from here, so that a queue of cancelled work keeps no images
        ahead = begin(lambda given=given: embedded(given.pop()))  # type: ignore[misc]
        try:
            following = next(iterator, None)
            own_BD = None if following is None else embedded(following[0])
            late = ahead.cancel()  # it waits behind other work
            embedded_BD = embedded(images_B3HW) if late else ahead.result()
        finally:  # nothing goes on behind an error or Ctrl-C
            given.clear()
            if not ahead.cancel():
                wait([ahead])
        yield _seen(encode, images_B3HW, embedded_BD, context), labels
        if following is not None and own_BD is not None:
            yield _seen(encode, following[0], own_BD, context), following[1]


def embed(encode: Any, inputs: Tensor, context: EvalContext) -> Tensor:
    """One batch, normalised, float32, on the CPU. `encode` must be of `context.model`: see EvalContext.saw."""
    return _seen(encode, inputs, _embed(encode, inputs, context), context)


@torch.no_grad()
def _embed(encode: Any, inputs: Tensor, context: EvalContext) -> Tensor:
    with torch.autocast(context.device.type, enabled=False):
        return F.normalize(encode(inputs.to(context.device)).float(), dim=-1).cpu()


def _seen(encode: Any, inputs: Tensor, embedded: Tensor, context: EvalContext) -> Tensor:
    if context.saw is not None:
        context.saw(context.model, encode, inputs, embedded)
    return embedded


def finite(embeddings: Tensor, name: str) -> Tensor:
    """The same, or a UserError: NaN compares as "not ahead of me", so a diverged model would win everything."""
    if not embeddings.isfinite().all():
        raise UserError(f"the model's embeddings of {name} are not finite; the run has diverged.")
    return embeddings


def _encode(folder: Path, split: str, context: EvalContext) -> Examples:
    evalset = evalsets.read(folder, context.transform, context.batch_size, split)
    if evalset.kind != "classification":
        raise UserError(f"evaluation set {folder.name}: a {evalset.kind} set; a probe needs a classification set.")
    context.model.eval()
    features_ND, labels = encode_images(evalset, context)
    return Examples(features_ND, torch.as_tensor(labels, dtype=torch.int64))
