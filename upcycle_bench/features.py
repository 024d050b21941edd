"""Features of evaluation sets. Those of images are encoded once for each model: cached by the hash of the weights.

    features_ND, beside = encode_images(evalset, context)                   # beside: labels, or captions
    examples = image_features(root / "digits-test", "test", context)       # cached if the weights have a hash
    classes_CD = encode_classes(evalset.classnames, evalset.templates, evalset.name, context, known={})

Shape suffixes: N samples, C classes, T templates, D embedding, B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench import evalsets
from upcycle_bench.cache import build_once, cache_root
from upcycle_bench.errors import UserError
from upcycle_bench.evalsets import EvalSet
from upcycle_bench.probe import Examples
from upcycle_bench.suite import EvalContext

VERSION = 1  # raise it when the same weights and images would give other features


def image_features(folder: Path, split: str, context: EvalContext) -> Examples:
    """Normalised image embeddings and labels of a classification set, on the CPU, from the cache if they are there."""
    if not context.weights:  # nobody knows what these are
        return _encode(folder, split, context)
    digest = evalsets.digest(folder, split)
    key = json.dumps([VERSION, context.weights, digest, split, context.device.type, torch.__version__])
    path = cache_root() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

    def build(staging: Path) -> None:
        made = _encode(folder, split, context)
        with staging.open("wb") as file:
            np.savez(file, features=made.features_ND.numpy(), labels=made.label_N.numpy())

    with np.load(build_once(path, build)) as arrays:
        return Examples(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]))


def encode_images(evalset: EvalSet, context: EvalContext) -> tuple[Tensor, list[Any]]:
    """Normalised image embeddings [N, D] and what stands beside each image: its label or its captions."""
    from webdataset.autodecode import DecodingError

    embeddings, beside = [], []
    try:
        for images_B3HW, labels_or_captions in context.track(evalset.batches, f"{evalset.name}: images"):
            embeddings.append(embed(context.model.encode_image, images_B3HW, context))
            beside.extend(labels_or_captions)
    except DecodingError as error:  # it has no words of its own
        raise UserError(
            f"evaluation set {evalset.name}: the .{error.k} of sample {error.key} cannot be read; `upcycle-bench data "
            "check` says what else is wrong."
        ) from error
    return finite(torch.cat(embeddings), evalset.name), beside


def encode_classes(
    classnames: Sequence[str], templates: Sequence[str], name: str, context: EvalContext, known: dict[str, Tensor]
) -> Tensor:
    """The zero-shot classifier [C, D]: the mean over templates, as in CLIP_benchmark's zero_shot_classifier."""
    prompts = [template.format(c=classname) for classname in classnames for template in templates]
    text_CTD = encode_texts(prompts, name, context, known).unflatten(0, (len(classnames), -1))
    return F.normalize(text_CTD.mean(dim=1), dim=1)


def encode_texts(texts: Sequence[str], name: str, context: EvalContext, known: dict[str, Tensor]) -> Tensor:
    """Normalised text embeddings [len(texts), D]; a text is encoded once, into `known`, so equal ones tie exactly."""
    from upcycle_bench import packed  # DeepSpeed is behind it, and `list` imports the suites

    unknown_texts = [text for text in dict.fromkeys(texts) if text not in known]
    starts = range(0, len(unknown_texts), context.batch_size)
    # without padding where we can: most prompts are far shorter than the context
    model: Any = context.model
    encode = partial(packed.encode_text, model) if packed.packs(model) else model.encode_text
    for start in context.track(starts, f"{name}: texts"):
        batch = unknown_texts[start : start + context.batch_size]
        text_BD = embed(encode, context.tokenizer(batch), context)
        known.update(zip(batch, text_BD, strict=True))
    return finite(torch.stack([known[text] for text in texts]), name)


@torch.no_grad()
def embed(encode: Any, inputs: Tensor, context: EvalContext) -> Tensor:
    """One batch, normalised, float32, on the CPU."""
    with torch.autocast(context.device.type, enabled=False):
        return F.normalize(encode(inputs.to(context.device)).float(), dim=-1).cpu()


def finite(embeddings: Tensor, name: str) -> Tensor:
    """The same, or a UserError: NaN compares as "not ahead of me", so a diverged model would win everything."""
    if not embeddings.isfinite().all():
        raise UserError(f"the model's embeddings of {name} are not finite; the run has diverged.")
    return embeddings


def _encode(folder: Path, split: str, context: EvalContext) -> Examples:
    evalset = evalsets.read(folder, context.transform, context.batch_size, split)
    if evalset.kind != "classification":
        raise UserError(
            f"evaluation set {folder.name}: it has captions, not labels; a probe needs a classification set."
        )
    context.model.eval()
    features_ND, labels = encode_images(evalset, context)
    return Examples(features_ND, torch.as_tensor(labels, dtype=torch.int64))
