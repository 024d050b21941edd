"""One process that loads training pairs, ours against open_clip's webdataset pipeline: images per second, in turns.

usage: python tests/bench/loader.py [--pairs 20000] [--rounds 7] [--folder /data/bench]     prints both, and bytes read
       python tests/bench/loader.py --delay 0.05      each read takes 50 ms longer, as from an object store;
                                                      with and without the threads that read ahead

Both read the same JPEGs of about 25 kB, crop them by the same transform and tokenise their captions. Theirs makes
normalised floats; ours leaves that to the device. Bytes read are counted by the kernel (`rchar`), over an epoch.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from upcycle_bench.data import places
from upcycle_bench.data.batches import Loading
from upcycle_bench.data.blocks import Reader
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.protocol import Data

BATCH = 256
PICTURES = 200  # that are drawn; the shards repeat them
PER_SHARD = 1000
WARM = 3  # batches before the clock starts: theirs fills a buffer


def write_shards(folder: Path, pairs: int, per_shard: int = PER_SHARD) -> list[Path]:
    """Shards as img2dataset writes them: a .jpg, a .txt and a .json each."""
    pictures = [_picture(number) for number in range(min(pairs, PICTURES))]
    paths = []
    for number in range(0, pairs, per_shard):
        paths.append(folder / f"{number // per_shard:05}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for pair in range(number, min(pairs, number + per_shard)):
                text = f"a photo of number {pair} with a few words more, as captions of the web have them"
                files = {"jpg": pictures[pair % len(pictures)], "txt": text.encode(), "json": b'{"width": 224}'}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{pair:09}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return paths


def _picture(number: int) -> bytes:
    """A JPEG of 224 pixels and about 25 kB: smooth colours under noise."""
    random = np.random.default_rng(number)
    colours = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = colours.resize((224, 224), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth, dtype=np.float32) + random.normal(0, 14, (224, 224, 1)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def ours(paths: list[Path], clip: Clip, pairs: int) -> PairDataset:
    """Our pairs, in blocks, loaded by one process."""
    settings = Data(world="local", seed=0, window=max(1, pairs // 4))
    return PairDataset(
        paths, clip, "random-resized-crop", captions="text", settings=settings, loading=Loading(workers=1)
    )


def our_batches(data: PairDataset) -> Iterator[Any]:
    """A new loader, from step 0 on."""
    return data.batches("bench", 0, 10**9, BATCH)


def their_batches(paths: list[Path], clip: Clip, pairs: int) -> Iterator[Any]:
    """open_clip's loader as its trainer makes it, epoch after epoch."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_wds_dataset  # type: ignore[import-untyped]

    arguments = SimpleNamespace(
        train_data=f"{paths[0].parent}/{{{paths[0].stem}..{paths[-1].stem}}}.tar",
        train_num_samples=pairs,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=1,
        world_size=1,
        batch_size=BATCH,
    )
    transform = image_transform_v2(PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=True)
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=open_clip.get_tokenizer(clip.name))
    return itertools.chain.from_iterable(data.dataloader for _ in itertools.count())


def slow_reads(seconds: float) -> None:
    """From now on each read of a shard takes so much longer."""
    read = places.read

    def slow(place: str, *what: Any) -> bytes:
        time.sleep(seconds)
        return read(place, *what)

    places.read = slow  # type: ignore[assignment]


def without_threads(data: PairDataset) -> PairDataset:
    """The same pairs, read when they are needed."""
    data.reader._ahead.begin = lambda pieces: None  # type: ignore[method-assign]
    return data


def images_per_second(batches: Callable[[], Iterator[Any]], number: int) -> float:
    """Of one new loader, after its first batches."""
    loader = batches()
    for _ in range(WARM):
        next(loader)
    began = time.perf_counter()
    for _ in range(number):
        next(loader)
    seconds = time.perf_counter() - began
    del loader  # ends its process
    return number * BATCH / seconds


def bytes_read(data: PairDataset, ranks: int = 1, workers: int = 1) -> tuple[int, int, int]:
    """Bytes that all processes read from the shards in an epoch, the bytes of its images and captions, and the reads.

    Each process has a reader of its own; nothing is decoded. Workers that take turns read what one would.
    """
    order, before, samples, reads = data.order(BATCH), _rchar(), 0, 0
    share = BATCH // ranks
    for rank in range(ranks):
        for begin, stop in itertools.pairwise(order.cuts(rank * share, (rank + 1) * share, workers)):
            reader, known = Reader(data.index), None
            for step in range(len(data) // BATCH):
                group_MB, row = order.group("bench", step)
                if known is not group_MB:
                    reader.expect(group_MB[row:, begin:stop].flatten().numpy())
                    known = group_MB
                for number in group_MB[row, begin:stop].tolist():
                    raw = reader.read(number)
                    samples += len(raw.image) + len(raw.text)
            reads += reader.reads
    return _rchar() - before, samples, reads


def _rchar() -> int:
    """Bytes that this process has read so far, from page caches, too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    """Measure, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=10, help=f"of {BATCH} pairs, in each turn")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds")
    parser.add_argument("--folder", help="where the shards go; by default, a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        paths = write_shards(Path(name), given.pairs)
        clip = create_clip("ViT-B-32")
        data = ours(paths, clip, given.pairs)
        for ranks, workers in ((1, 1), (1, 4), (4, 1), (4, 4)):
            read, samples, reads = bytes_read(data, ranks, workers)
            each = given.pairs // BATCH * BATCH / reads
            print(
                f"{ranks} ranks x {workers} workers: bytes read / bytes of the samples {read / samples:.3f}; "
                f"{each:.1f} pairs a read"
            )
        print(f"mean sample: {samples / (given.pairs // BATCH * BATCH):,.0f} bytes")
        turns = {"ours": lambda: our_batches(data), "open_clip": lambda: their_batches(paths, clip, given.pairs)}
        if given.delay:
            slow_reads(given.delay)
            alone = without_threads(ours(paths, clip, given.pairs))
            turns = {"ours": turns["ours"], "ours without threads": lambda: our_batches(alone)}
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(given.rounds):
            for side, batches in turns.items():
                rates[side].append(images_per_second(batches, given.batches))
            print(f"turn {turn}:", *(f"{side} {found[-1]:,.0f}" for side, found in rates.items()), flush=True)
        for side, found in rates.items():
            print(f"{side}: {statistics.median(found):,.0f} images/s ({min(found):,.0f} to {max(found):,.0f})")
        first, second = (statistics.median(found) for found in rates.values())
        print(f"ratio of medians: {first / second:.3f}")


if __name__ == "__main__":
    main()
