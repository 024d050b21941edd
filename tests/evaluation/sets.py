"""Small evaluation sets for the tests of certificates: noisy pictures of four tints."""

from pathlib import Path

import numpy as np
from PIL import Image

from upcycle_bench.data import evalset_write

NAMES = ("red", "green", "blue", "grey")


def write_sets(folder: Path) -> None:
    """`colours`, sorted by class: 90, 60, 40 and 10 pictures; `pairs`: the same pictures with captions."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), (90, 60, 40, 10))
    tints = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [120, 120, 120]])
    noise = rng.integers(-40, 40, (200, 8, 8, 3))
    pictures = [Image.fromarray(p) for p in (tints[labels][:, None, None] + noise).astype(np.uint8)]
    evalset_write.write_classification(
        folder / "colours", zip(pictures, labels.tolist(), strict=True), NAMES, ("{c}", "all {c}")
    )
    evalset_write.write_classification(
        folder / "colours", zip(pictures, labels.tolist(), strict=True), NAMES, ("{c}",), split="train"
    )
    captions = [[f"{NAMES[label]} {i}"] for i, label in enumerate(labels)]
    evalset_write.write_retrieval(folder / "pairs", zip(pictures, captions, strict=True))
