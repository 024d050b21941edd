"""Text embeddings of evaluation sets: encoded in batches, without padding, and once for each file of weights.

    known: dict[str, Tensor] = {}                                         # text -> its embedding, for one evaluation
    classes_YC = class_embeddings(evalset, context, known)
    texts_NC = encode_texts(captions, evalset.name, context, known)
    task = classification_task(evalset, context, known)                   # its images against its classes

Class embeddings are cached under the weights, the class names, the templates and the tokenizer; captions likewise. A
second evaluation of the same weights encodes no text, or a few where a witness watches. Where the model can do without
padding, a batch is as long as its longest text.

Shape suffixes: N texts or images, Q queries, G gallery, Y classes, P templates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation.embedding_cache import Arrays, remembered
from upcycle_bench.evaluation.features import embed, encode_images, finite
from upcycle_bench.evaluation.ranking import Task
from upcycle_bench.model import padding
from upcycle_bench.suite import EvalContext
from upcycle_bench.util import strict_json
from upcycle_bench.util.flops import uncounted

PROBES = 16  # texts whose tokens represent the tokenizer and its context length in a key


def class_embeddings(evalset: EvalSet, context: EvalContext, known: dict[str, Tensor]) -> Tensor:
    """Class embeddings [Y, C]: the mean over templates, normalised, as in CLIP_benchmark's zero_shot_classifier."""
    prompts = [template.format(c=name) for name in evalset.classnames for template in evalset.templates]
    templates = len(evalset.templates)

    def make(classes: Sequence[int], known: dict[str, Tensor]) -> Arrays:
        chosen = [text for one in classes for text in prompts[one * templates : (one + 1) * templates]]
        text_YPC = _encode(chosen, evalset.name, context, known).unflatten(0, (len(classes), -1))
        return {"classes": F.normalize(text_YPC.mean(dim=1), dim=1).numpy()}

    what = ["classes", evalset.classnames, evalset.templates, _tokens_of(prompts, context)]
    everything = partial(make, range(len(evalset.classnames)), known)
    arrays = remembered(what, context, everything, partial(make, known={}))
    return torch.from_numpy(arrays["classes"])


def classification_task(evalset: EvalSet, context: EvalContext, known: dict[str, Tensor]) -> Task:
    """Images as queries, class embeddings as the gallery."""
    classes_YC = class_embeddings(evalset, context, known)
    images_QC, labels = encode_images(evalset, context)
    return Task(images_QC, classes_YC, torch.as_tensor(labels), torch.arange(len(classes_YC)))


def retrieval_tasks(evalset: EvalSet, context: EvalContext, known: dict[str, Tensor]) -> tuple[Task, Task]:
    """Images as queries for their captions, and captions as queries for their image; ids are numbers of images."""
    images_NC, captions = encode_images(evalset, context)
    texts_GC = encode_texts([text for texts in captions for text in texts], evalset.name, context, known)
    image_id = torch.arange(len(captions))
    text_image_id = image_id.repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    return Task(images_NC, texts_GC, image_id, text_image_id), Task(texts_GC, images_NC, text_image_id, image_id)


def encode_texts(texts: Sequence[str], name: str, context: EvalContext, known: dict[str, Tensor]) -> Tensor:
    """Normalised text embeddings [N, C] of the set `name`. Equal texts are encoded once, so that they tie exactly."""
    different = list(dict.fromkeys(texts))
    what = ["texts", hashlib.sha256(strict_json.dumps(different).encode()).hexdigest(), _tokens_of(different, context)]

    def make(rows: Sequence[int], known: dict[str, Tensor]) -> Arrays:
        return {"texts": _encode([different[row] for row in rows], name, context, known).numpy()}

    arrays = remembered(what, context, partial(make, range(len(different)), known), partial(make, known={}))
    known.update(zip(different, torch.from_numpy(arrays["texts"]), strict=True))
    return torch.stack([known[text] for text in texts])


def cut_texts(texts: Sequence[str], tokenizer: Any) -> dict[str, int]:
    """How many of the texts are longer than the context, so that open_clip's tokenizer cuts them without a word.

    Returns {"texts", "cut", "tokens"}; nothing where none is cut, and for tokenizers of which that is not known.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    own_way = getattr(tokenizer, "reduction_fn", None) or getattr(tokenizer, "tokenizer_mode", None)
    if not isinstance(tokenizer, SimpleTokenizer | HFTokenizer) or own_way:
        return {}
    length = tokenizer.context_length
    long = [text for text in texts if len(text.encode()) > length - 2]  # a token is a byte at least; two mark the ends
    if not long:
        return {}
    with uncounted():
        last_N, then_N = tokenizer(long, length)[:, -1], tokenizer(long, length + 1)[:, length - 1]
    cut = int((last_N != then_N).sum())  # with room for one token more, a text that was cut ends later
    return {"texts": len(texts), "cut": cut, "tokens": length} if cut else {}


def _encode(texts: Sequence[str], name: str, context: EvalContext, known: dict[str, Tensor]) -> Tensor:
    """Text embeddings [N, C], which are added to `known`; only texts that it lacks are encoded."""
    unknown = [text for text in dict.fromkeys(texts) if text not in known]
    model: Any = context.model
    encode = padding.text_encoder(model)
    for start in context.track(range(0, len(unknown), context.batch_size), f"{name}: texts"):
        batch = unknown[start : start + context.batch_size]
        with uncounted():
            token_BL = context.tokenizer(batch)
        text_BC = embed(encode, token_BL, context)
        known.update(zip(batch, text_BC, strict=True))
    return finite(torch.stack([known[text] for text in texts]), name)


def _tokens_of(texts: Sequence[str], context: EvalContext) -> list[Any]:
    """The part of a key that tells tokenizers and context lengths apart: the tokens of a few of these texts."""
    if not context.weights:
        return []
    chosen = [*texts[:: -(-len(texts) // PROBES)], max(texts, key=len)]
    token_BL = context.tokenizer(chosen)
    return [
        metadata.version("open_clip_torch"),
        list(token_BL.shape),
        hashlib.sha256(token_BL.numpy().tobytes()).hexdigest(),
    ]
