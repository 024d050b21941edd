"""Held-out pairs that are scored again and again during a training: the curves of reports.

    held_out = held_out_pairs(protocol.validation, clip, world.eval_root, precision="bf16")
    held_out.score()                    # the mean log rank of the right answer, both ways of retrieval; every rank

A score changes no bit of the training: the model is in evaluation mode meanwhile, and nothing is drawn. It is rough on
purpose: some pairs, each with its first caption, in the precision of the training. The suites judge the final model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.evaluation.features import finite
from upcycle_bench.evaluation.ranking import Task, chance_log_rank, judge
from upcycle_bench.model.clip import Clip
from upcycle_bench.planning.fingerprint import fingerprint
from upcycle_bench.protocol import Validation
from upcycle_bench.training.job import Curve
from upcycle_bench.training.step import Features
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError

BATCH = 256  # pairs


class _Pairs(NamedTuple):
    """This rank's share."""

    images_N3HW: Tensor
    text_NL: Tensor


class HeldOutPairs:
    """Evenly spaced pairs of a retrieval set, an equal share on each rank. They are read when first scored."""

    def __init__(self, settings: Validation, clip: Clip, folder: Path, precision: str) -> None:
        self.every, self._clip, self._folder, self._precision = settings.every, clip, folder, precision
        samples = list(evalsets.samples(folder))
        world = distributed.world_size()
        self.pairs = min(settings.pairs, len(samples)) // world * world
        if self.pairs < 2:
            raise UserError(
                f"validation: {folder.name} has {len(samples)} pairs for {world} ranks; choose a larger set."
            )
        self._samples = [samples[number * len(samples) // self.pairs] for number in range(self.pairs)]
        self._captions = [sample.label[0] for sample in self._samples]
        number = {caption: place for place, caption in enumerate(dict.fromkeys(self._captions))}
        self._caption_N = np.array([number[caption] for caption in self._captions])
        self._features = Features(clip.model, precision)
        self._read: _Pairs | None = None
        self.identity = fingerprint([folder.name, evalsets.digest(folder), self.pairs, precision, clip.pixels])

    def curve(self) -> Curve:
        """One without points."""
        chance = chance_log_rank(np.bincount(self._caption_N)[self._caption_N], self.pairs)
        return Curve(self.identity, self._folder.name, self.pairs, chance)

    @torch.no_grad()
    def score(self) -> float:
        """The mean log rank now, from 0 on; every rank must call it. UserError for embeddings that are not finite."""
        pairs = self._read = self._read or self._load()
        model = self._clip.model
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            image, text = zip(
                *(self._embed(pairs, start, device) for start in range(0, len(pairs.text_NL), BATCH)), strict=True
            )
        finally:
            model.train(training)
        image_NC, text_NC = (
            finite(distributed.gather(torch.cat(each)).cpu(), self._folder.name) for each in (image, text)
        )
        id_N = torch.from_numpy(self._caption_N)  # equal captions are right answers to each other's images
        ways = [(image_NC, text_NC), (text_NC, image_NC)]
        judged = [judge(Task(*way, id_N, id_N), 1.0, self._folder.name) for way in ways]
        return float(sum(way.log_rank_Q.mean() for way in judged) / 2)

    def _embed(self, pairs: _Pairs, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = slice(start, start + BATCH)
        images = self._clip.normalise(pairs.images_N3HW[rows].to(device))
        image_BC, text_BC, _ = self._features(images, pairs.text_NL[rows].to(device))
        return image_BC, text_BC

    def _load(self) -> _Pairs:
        share = self.pairs // distributed.world_size()
        mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        images = [torch.tensor(self._clip.resize(sample.image())) for sample in self._samples[mine]]
        return _Pairs(torch.stack(images), self._clip.tokenize(self._captions[mine]))


def held_out_pairs(settings: Validation | None, clip: Clip, root: Path, precision: str) -> HeldOutPairs | None:
    """The pairs of the protocol's set below `root`; None where it wants none, and, which is said, without that set.

    Raises UserError for a set that is not a retrieval set.
    """
    if settings is None or settings.every == 0:
        return None
    folder = root / settings.set
    if not (folder / "test" / "nshards.txt").is_file():
        if distributed.is_main():
            print(f"no curve of held-out pairs: there is no evaluation set {settings.set} in {root}", file=sys.stderr)
        return None
    if (kind := evalsets.kind_of(folder)) != "retrieval":
        raise UserError(f"validation.set: {settings.set} is a {kind} set; it must be a retrieval set.")
    return HeldOutPairs(settings, clip, folder, precision)
