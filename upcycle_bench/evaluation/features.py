"""Image embeddings of evaluation sets; for probes they are cached, once for each file of weights.

    features_NC, labels = encode_images(evalset, context)                  # captions, not labels, of a retrieval set
    examples = image_features(root / "digits-test", "test", context)       # cached if the weights have a hash

Shape suffixes: N samples.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data import labelled
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation.embedding_cache import Arrays, remembered
from upcycle_bench.evaluation.probe import Examples
from upcycle_bench.model import backends
from upcycle_bench.suite import EvalContext
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import counted_once


def image_features(folder: Path, split: str, context: EvalContext) -> Examples:
    """Normalised image embeddings and labels of a classification set, on the CPU, from the cache if it has them.

    Raises UserError for a set of another kind, and the errors of `encode_images`.
    """

    def make() -> Arrays:
        evalset = evalsets.read(folder, context.transform, context.batch_size, split)
        if evalset.kind != "classification":
            raise UserError(f"evaluation set {folder.name}: a {evalset.kind} set; a probe needs a classification set.")
        context.model.eval()
        features_NC, labels = encode_images(evalset, context)
        return {"features": features_NC.numpy(), "labels": torch.as_tensor(labels, dtype=torch.int64).numpy()}

    def again(rows: Sequence[int]) -> Arrays:
        chosen = labelled.index(folder, split).take(np.array(rows))
        images_B3HW, _ = next(chosen.batches(context.transform, len(rows)))
        return {"features": embed(context.model.encode_image, images_B3HW, context).numpy()}

    what = ["images", evalsets.digest(folder, split), split] if context.weights else []
    arrays = remembered(what, context, make, again)
    return Examples(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]))


def encode_images(evalset: EvalSet, context: EvalContext) -> tuple[Tensor, list[Any]]:
    """Normalised image embeddings [N, C], and each image's label or captions.

    Raises UserError for a sample that is not valid, for a number of strata that is not that of the images, and for
    embeddings that are not finite.
    """
    embeddings, labels_or_captions = [], []
    flops: dict[Hashable, int] = {}
    # The FLOPs of a batch depend on its shape alone, so one batch of each shape is counted. DeepSpeed's layer is the
    # exception: it computes as many rows for each expert as the busiest one has, so there every batch is counted.
    alike = backends.forced() != "deepspeed"
    for images_B3HW, beside in context.track(evalset.batches, f"{evalset.name}: images"):
        with counted_once(flops, images_B3HW.shape) if alike else contextlib.nullcontext():
            embeddings.append(embed(context.model.encode_image, images_B3HW, context))
        labels_or_captions.extend(beside)
    evalsets.require_strata(evalset.name, evalset.strata, len(labels_or_captions))
    return finite(torch.cat(embeddings), evalset.name), labels_or_captions


@torch.no_grad()
def embed(encode: Any, inputs: Tensor, context: EvalContext) -> Tensor:
    """Embeddings of one batch [B, C], normalised, float32, on the CPU; then `context.on_encoded` is called.

    `encode` is a method of `context.model`, or calls one.
    """
    if context.encoded is not None:
        return _encoded_once(encode, inputs, context, context.encoded)
    with torch.autocast(context.device.type, enabled=False):
        embedded_BC = F.normalize(encode(inputs.to(context.device)).float(), dim=-1).cpu()
    if context.on_encoded is not None:
        context.on_encoded(context.model, encode, inputs, embedded_BC)
    return embedded_BC


def _encoded_once(encode: Any, inputs: Tensor, context: EvalContext, known: dict[Any, Tensor]) -> Tensor:
    """The same, but only inputs that `known` lacks are encoded."""
    what = getattr(encode, "func", encode)  # partials of one function are not equal
    keys = [(what, row.dtype, row.shape, hashlib.sha256(row.contiguous().numpy()).digest()) for row in inputs.cpu()]
    new = [place for place, key in enumerate(keys) if key not in known]
    if new:
        made_BC = embed(encode, inputs[new], replace(context, encoded=None))
        known.update(zip((keys[place] for place in new), made_BC, strict=True))
    return torch.stack([known[key] for key in keys])


def finite(embeddings: Tensor, name: str) -> Tensor:
    """The embeddings; UserError where one is not finite. No answer is ahead of NaN, so a diverged model would win."""
    if not embeddings.isfinite().all():
        raise UserError(f"the model's embeddings of {name} are not finite; the run has diverged.")
    return embeddings
