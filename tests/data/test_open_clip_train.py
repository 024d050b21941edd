"""open_clip's own trainer works where we are installed: it reads our shards, and no pin of ours excludes its own."""

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from upcycle_bench.data.evalset_write import write_shard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SAMPLES = [{"png": bytes(n * 1000), "txt": b"one\ntwo"} for n in range(3)]


def test_the_trainer_reads_our_shards(tmp_path: Path) -> None:
    """Later versions of webdataset end each shard with an empty mapping, and this is KeyError: 'fname'."""
    from open_clip_train.data import tarfile_to_samples_nothrow

    shards = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for shard in shards:
        assert write_shard(shard, SAMPLES) == 3
    read = list(tarfile_to_samples_nothrow([{"url": str(shard)} for shard in shards]))
    assert [sample["__key__"] for sample in read] == [f"{shard}-{n:08d}" for shard in (0, 1) for n in range(3)]
    assert [{suffix: sample[suffix] for suffix in ("png", "txt")} for sample in read] == SAMPLES * 2


def test_the_bytes_of_a_shard_depend_on_no_version_of_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", SAMPLES)
    digest = hashlib.sha256((tmp_path / "0.tar").read_bytes()).hexdigest()
    assert digest == "576c9893bdb0f52b546eb5c47c7005ac362e5f54368f111dc7dab74082a9ed15"


def ours() -> list[Requirement]:
    return [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]


def theirs(distribution: str, extra: str = "") -> list[Requirement]:
    found = map(Requirement, importlib.metadata.requires(distribution) or [])
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize("other", [theirs("open_clip_torch", "training"), theirs("clip_benchmark")])
def test_one_environment_holds_what_they_and_we_ask_for(other: list[Requirement]) -> None:
    """Of what both ask for, what is installed fits both."""
    shared = {each.name.lower(): each for each in other if each.name.lower() in {mine.name.lower() for mine in ours()}}
    assert "webdataset" in shared
    for mine in ours():
        if (their := shared.get(mine.name.lower())) is not None:
            version = importlib.metadata.version(mine.name)
            assert mine.specifier.contains(version), (str(mine), version)
            assert their.specifier.contains(version), (str(their), version)


def test_no_version_that_we_allow_breaks_the_trainer() -> None:
    """The pins themselves: each version of webdataset that ours allows, the trainer's extra allows, too."""
    (mine,) = (each.specifier for each in ours() if each.name == "webdataset")
    (their,) = (each.specifier for each in theirs("open_clip_torch", "training") if each.name == "webdataset")
    released = ("0.2.48", "0.2.57", "0.2.77", "0.2.86", "0.2.90", "0.2.100", "0.2.111", "1.0.2", "1.1")
    assert [version for version in released if mine.contains(version)] == ["0.2.48", "0.2.57", "0.2.77", "0.2.86"]
    assert all(their.contains(version) for version in released if mine.contains(version))
