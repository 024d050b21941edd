"""Training pairs: pure functions of (seed, step), slices by rank, captions, crops, shards named on the command line."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upcycle_bench.data.bad_samples import Bad
from upcycle_bench.data.batches import Loading
from upcycle_bench.data.labelled import Labelled
from upcycle_bench.data.pairs import PairDataset, PickedBatches
from upcycle_bench.data.shards import shards_digest
from upcycle_bench.data.sources import expand_shards
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.protocol import Data
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream


@pytest.fixture(scope="module")
def clip() -> Clip:
    return create_clip("smoke-vit")


def write_tar(path: Path, count: int, start: int = 0, size: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(start, start + count):
            pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            files = {"png": buffer.getvalue(), "txt": f"first {number}\n\nsecond {number}\n".encode(), "json": b"{}"}
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def pairs(tmp_path: Path, clip: Clip) -> PairDataset:
    shards = [write_tar(tmp_path / "0.tar", 30), write_tar(tmp_path / "1.tar", 25, start=30)]
    return PairDataset(shards, clip)


def test_a_broken_image_is_replaced_in_training_and_one_line_in_evaluation(tmp_path: Path, clip: Clip) -> None:
    """The line names the shard and the place; both read an intact image alike."""
    shard = write_tar(tmp_path / "0.tar", 2)
    with tarfile.open(shard) as tar:
        whole, broken = [
            (0, tar.getmember(f"0000{n}.png").offset_data, tar.getmember(f"0000{n}.png").size) for n in (0, 1)
        ]
    content = bytearray(shard.read_bytes())
    content[broken[1] : broken[1] + 8] = b"no image"
    expected = PairDataset([shard], clip).decode(0)[0]
    shard.write_bytes(content)
    labelled = Labelled((shard,), np.array([whole, broken]), np.array([0, 0]))
    ((image, _),) = labelled.take(np.array([0])).batches(lambda image: torch.from_numpy(clip.resize(image)), 1)
    assert np.array_equal(image[0].numpy(), expected)
    batch = PairDataset([shard], clip).batch(0, 0, 2)
    assert batch.index.tolist() == [0, 0] and np.array_equal(batch.images[1].numpy(), expected)
    assert batch.bad == (Bad(1, "unreadable image", "0.tar", "00001"),)
    where = rf"0\.tar: the image at byte {broken[1]} \(00001\.png\) cannot be read \(.*\); "
    with pytest.raises(UserError, match=where + "`upcycle-bench data check` says"):
        list(labelled.batches(lambda image: torch.zeros(1), 2))


def test_a_batch_is_a_function_of_seed_and_step(pairs: PairDataset) -> None:
    later = pairs.batch(0, 7, 10)
    for step in range(7):
        pairs.batch(0, step, 10)
    again = pairs.batch(0, 7, 10)
    assert torch.equal(later.index, again.index)
    assert torch.equal(later.images, again.images)
    assert torch.equal(later.texts, again.texts)
    assert not torch.equal(later.index, pairs.batch(1, 7, 10).index)


def test_epochs_are_permutations_without_their_incomplete_end(pairs: PairDataset) -> None:
    # 55 pairs, batches of 10: five steps an epoch, five pairs left out, others in the next epoch
    epochs = [torch.cat([pairs.batch(0, epoch * 5 + step, 10).index for step in range(5)]) for epoch in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 50
    assert not torch.equal(*epochs)


def test_ranks_share_one_global_batch(pairs: PairDataset) -> None:
    whole = pairs.batch(3, 2, 12)
    parts = [pairs.batch(3, 2, 12, rank, 3) for rank in range(3)]
    for field in ("index", "images", "texts"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))


def test_images_and_captions_belong_together(pairs: PairDataset, clip: Clip) -> None:
    batch = pairs.batch(0, 0, 20)
    captions = set()
    for image, text, number in zip(batch.images, batch.texts, batch.index.tolist(), strict=True):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        expected = clip.transform(Image.fromarray(pixels))
        assert torch.allclose(clip.normalise(image[None])[0], expected, atol=1e-6)
        own = [clip.tokenize([f"{order} {number}"])[0] for order in ("first", "second")]
        matches = [torch.equal(text, candidate) for candidate in own]
        assert sum(matches) == 1
        captions.add(matches.index(True))
    assert captions == {0, 1}  # both lines are drawn


def test_workers_give_the_same_batches(pairs: PairDataset) -> None:
    alone = list(pairs.batches(0, 2, 5, 10))
    pairs.loading = Loading(workers=2)
    helped = list(pairs.batches(0, 2, 5, 10))
    assert len(alone) == 3
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts) for a, b in zip(alone, helped, strict=True)
    )


def test_crops_are_drawn_from_their_own_stream(pairs: PairDataset, clip: Clip) -> None:
    augmented = PairDataset(pairs.shards, clip, "random-resized-crop")
    torch.manual_seed(0)
    first = augmented.batch(0, 0, 10)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = augmented.batch(0, 0, 10)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, pairs.batch(0, 0, 10).images)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator was put back


def test_calibration_pairs_are_distinct_and_at_most_all(pairs: PairDataset) -> None:
    rng = Stream(("calibration", 0))
    index = torch.cat([batch.index for batch in pairs.calibration(rng, 20, 8)])
    assert len(index) == len(set(index.tolist())) == 20
    assert sum(len(batch.index) for batch in pairs.calibration(rng, 10_000, 16)) == 55


def test_expand_shards(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n:03d}.tar", 1) for n in range(8, 12)]
    assert expand_shards(str(tmp_path)) == tuple(map(str, paths))
    assert expand_shards(f"{tmp_path}/{{008..010}}.tar") == tuple(map(str, paths[:3]))
    assert expand_shards(str(paths[1])) == (str(paths[1]),)
    with pytest.raises(UserError, match=r"no such file: .*012\.tar"):
        expand_shards(f"{tmp_path}/{{008..012}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        expand_shards(str(tmp_path / "empty"))


def test_shards_that_are_there_are_taken_literally(tmp_path: Path, clip: Clip) -> None:
    """A range is expanded only where no such file is (webdataset/webdataset 381)."""
    folder = tmp_path / "{0..1} a, b::c"
    paths = [write_tar(folder / name, 1) for name in ("0,{1..2}.tar", "{3..4}::x y.tar")]
    assert expand_shards(str(folder)) == tuple(map(str, paths))
    assert expand_shards(str(paths[0])) == (str(paths[0]),)
    assert len(PairDataset(paths, clip)) == 2


def test_shards_digest_sees_content_names_and_sizes(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a" / "0.tar", 3)
    same = write_tar(tmp_path / "b" / "0.tar", 3)
    other = write_tar(tmp_path / "c" / "0.tar", 3, start=1)
    renamed = write_tar(tmp_path / "d" / "1.tar", 3)
    assert shards_digest([first]) == shards_digest([same])
    assert len({shards_digest([path]) for path in (first, other, renamed)}) == 3


def test_unusable_shards_are_one_line(tmp_path: Path, clip: Clip) -> None:
    garbage = tmp_path / "g.tar"
    garbage.write_bytes(b"not a tar file" * 100)
    with pytest.raises(UserError, match="not a readable tar file"):
        PairDataset([garbage], clip)
    empty = tmp_path / "e.tar"
    tarfile.open(empty, "w").close()
    with pytest.raises(UserError, match="no sample with an image"):
        PairDataset([empty], clip)


def test_captions_and_crops_are_drawn_anew_for_every_step_and_seed(pairs: PairDataset, clip: Clip) -> None:
    """A batch has all 55 pairs, so each step has the same pairs, with one of two captions and a crop of its own."""
    cropped = PairDataset(pairs.shards, clip, "random-resized-crop")
    picked = PickedBatches(cropped, torch.arange(55).expand(2, -1))
    for source in (pairs, cropped, picked):
        first, *others = (source.batch(seed, step, 55) for seed, step in ((0, 0), (0, 1), (1, 0)))
        for other in others:
            ours, theirs = (batch.index.argsort() for batch in (first, other))
            assert torch.equal(first.index[ours], other.index[theirs])
            new_captions = (first.texts[ours] != other.texts[theirs]).any(dim=1).sum()
            new_crops = (first.images[ours] != other.images[theirs]).flatten(1).any(dim=1).sum()
            assert 10 < new_captions < 45  # half of them, on average
            assert new_crops == 0 if source is pairs else new_crops > 20


def test_shards_digest_sees_both_ends_of_a_large_shard(tmp_path: Path) -> None:
    (shard := tmp_path / "large.tar").write_bytes(bytes(3 << 20))
    digests = {shards_digest([shard])}
    for place in (0, (1 << 20) - 1, 2 << 20, -1):
        content = bytearray(3 << 20)
        content[place] = 1
        shard.write_bytes(content)
        digests.add(shards_digest([shard]))
    assert len(digests) == 5


def test_suffixes_in_capitals_are_read_too(tmp_path: Path, clip: Clip) -> None:
    """A camera's 00000.JPG is an image: the pairs are those of the same shard in small letters."""
    shards = [write_tar(tmp_path / "0.tar", 4), tmp_path / "capitals.tar"]
    with tarfile.open(shards[0]) as source, tarfile.open(shards[1], "w") as target:
        for member in source:
            content = source.extractfile(member)
            member.name = member.name.upper()
            target.addfile(member, content)
    small, capitals = (PairDataset([shard], clip).batch(0, 0, 4) for shard in shards)
    assert torch.equal(small.images, capitals.images)
    assert torch.equal(small.texts, capitals.texts)


def test_each_sample_of_a_batch_has_a_crop_of_its_own(pairs: PairDataset, clip: Clip) -> None:
    """The augmentation returns what it draws: no two of 20 samples draw the same."""
    noisy = replace(clip, augment=lambda image: torch.randint(256, (3, 32, 32), dtype=torch.uint8).numpy())
    images = PairDataset(pairs.shards, noisy, "random-resized-crop").batch(0, 0, 20).images
    assert len(images.flatten(1).unique(dim=0)) == 20


def test_weights_of_other_sources_are_refused_at_once(pairs: PairDataset, clip: Clip) -> None:
    settings = Data(world="local", seed=0, order="replacement", weights=(1.0, 2.0))
    with pytest.raises(UserError, match=r"^--data: data\.weights has 2 numbers, and the training shards are 1 sources"):
        PairDataset(pairs.shards, clip, option="--data", settings=settings)


def test_an_order_that_is_drawn_gives_decoded_pairs_too(pairs: PairDataset, clip: Clip) -> None:
    settings = Data(world="local", seed=0, order="replacement")
    drawn = [PairDataset(pairs.shards, clip, keep_decoded=kept, settings=settings) for kept in (True, False)]
    for step in range(8):
        fast, slow = (each.batch("a", step, 10) for each in drawn)
        assert torch.equal(fast.index, slow.index) and torch.equal(fast.images, slow.images)
    assert not torch.equal(slow.index, pairs.batch("a", 7, 10).index)


def test_each_pair_has_the_number_of_its_shard(tmp_path: Path, clip: Clip) -> None:
    """In 4 bytes a pair, by no array of 8: there may be 400 million."""
    pairs = PairDataset([write_tar(tmp_path / f"{n}.tar", n + 2) for n in range(3)], clip, keep_decoded=False)
    found = pairs.shard_numbers()
    assert found.dtype == torch.int32 and found.tolist() == pairs.index.shard_of(np.arange(9)).tolist()
