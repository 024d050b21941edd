"""Held-out pairs that are scored again and again during a training: the curves of reports.

    held_out = held_out_pairs(protocol.validation, dense, world.eval_root, precision="bf16")
    held_out.score(clip)                # the mean log rank of the right answer, both ways of retrieval; every rank

A score changes no bit of the training: the model is in evaluation mode meanwhile, and nothing is drawn. It is rough on
purpose: some pairs, each with its first caption, in the precision of the training. The suites judge the final model.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.evaluation.ranking import Task, chance_log_rank, judge
from upcycle_bench.model.clip import Clip
from upcycle_bench.planning.fingerprint import fingerprint
from upcycle_bench.protocol import Validation
from upcycle_bench.training.job import Curve
from upcycle_bench.training.step import Features
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import DivergedError, UserError

BATCH = 256  # pairs


class HeldOutPairs:
    """Evenly spaced pairs of a retrieval set, an equal share on each rank, as the transforms of `dense` read them.

    Raises UserError for another kind of set, too few pairs, and samples that are not valid.
    """

    def __init__(self, settings: Validation, dense: Clip, folder: Path, precision: str) -> None:
        self.every, self._name, self._precision = settings.every, folder.name, precision
        if (kind := evalsets.kind_of(folder)) != "retrieval":
            raise UserError(f"validation.set: {folder.name} is a {kind} set; it must be a retrieval set.")
        samples = list(evalsets.samples(folder))
        world, rank = distributed.world_size(), distributed.rank()
        self.pairs = min(settings.pairs, len(samples)) // world * world
        if self.pairs < 2:
            raise UserError(
                f"validation: {folder.name} has {len(samples)} pairs for {world} ranks; choose a larger set."
            )
        samples = [samples[number * len(samples) // self.pairs] for number in range(self.pairs)]
        captions = [sample.label[0] for sample in samples]
        number = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
        self._caption_N = np.array([number[caption] for caption in captions])  # of all ranks' pairs
        mine = slice(rank * self.pairs // world, (rank + 1) * self.pairs // world)
        self._images_N3HW = torch.stack([torch.tensor(dense.resize(sample.image())) for sample in samples[mine]])
        self._text_NL = dense.tokenize(captions[mine])
        facts = [folder.name, evalsets.digest(folder), self.pairs, self.every, precision, dense.pixels]
        self.identity = fingerprint(facts)

    def curve(self) -> Curve:
        """One without points."""
        chance = chance_log_rank(np.bincount(self._caption_N)[self._caption_N], self.pairs)
        return Curve(self.identity, self._name, self.pairs, self.every, chance)

    @torch.no_grad()
    def score(self, clip: Clip) -> float:
        """The mean log rank now; every rank must call it. DivergedError for embeddings that are not finite."""
        model, features = clip.model, Features(clip.model, self._precision)
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            batches = zip(self._images_N3HW.split(BATCH), self._text_NL.split(BATCH), strict=True)
            made = [features(clip.normalise(images.to(device)), text.to(device))[:2] for images, text in batches]
        finally:
            model.train(training)
        image_NC, text_NC = (distributed.gather(torch.cat(each)).cpu() for each in zip(*made, strict=True))
        if not (image_NC.isfinite().all() and text_NC.isfinite().all()):
            raise DivergedError(
                f"the model's embeddings of {self._name} are not finite: the training has diverged; lower the learning "
                "rate or look at the strategy's own loss."
            )
        return self._log_rank(image_NC, text_NC)

    def _log_rank(self, image_NC: Tensor, text_NC: Tensor) -> float:
        id_N = torch.from_numpy(self._caption_N)  # equal captions are right answers to each other's images
        ways = [(image_NC, text_NC), (text_NC, image_NC)]
        judged = [judge(Task(*way, id_N, id_N), 1.0, self._name) for way in ways]
        return float(sum(way.log_rank_Q.mean() for way in judged) / 2)


def held_out_pairs(
    settings: Validation | None, dense: Clip, root: Path, precision: str, left_out: Collection[str] = ()
) -> HeldOutPairs | None:
    """The pairs of the protocol's set below `root`, on every rank; None where it wants none.

    Rank 0 decides for all. A set that is not there, not valid or in `left_out` costs the curve and not the run: that is
    said. Another rank that cannot read what rank 0 can raises UserError.
    """
    if settings is None or settings.every == 0:
        return None
    made, why = None, ""
    if distributed.is_main():
        made, why = _try(settings, dense, root, precision, left_out)
    if why := distributed.from_main(why):
        if distributed.is_main():
            print(f"no curve of held-out pairs: {why}", file=sys.stderr)
        return None
    return made or HeldOutPairs(settings, dense, root / settings.set, precision)


def _try(
    settings: Validation, dense: Clip, root: Path, precision: str, left_out: Collection[str]
) -> tuple[HeldOutPairs | None, str]:
    """The pairs, or why there are none."""
    folder = root / settings.set
    if not (folder / "test" / "nshards.txt").is_file():
        return None, f"there is no evaluation set {settings.set} in {root}"
    if settings.set in left_out:
        return None, f"evaluation set {settings.set} is left out"
    try:
        return HeldOutPairs(settings, dense, folder, precision), ""
    except UserError as error:
        return None, str(error)
